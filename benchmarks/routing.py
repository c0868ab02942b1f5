"""What watching a model's routing costs: time beside the plain forward pass, and memory over a long run.

The model has 16 layers of 64 experts, 8 of them for a token, and random weights. For the time it is 512 wide and its
experts 256: the narrower a model, the more it costs to watch it, in proportion, and OLMoE is four times as wide. One
half as wide is measured too, and recorded without a limit.
For the memory, which does not depend on the width, it is 64 wide and its experts 32, so that the run takes minutes.

Time is CPU time of one thread for 512 tokens: plain, captured (with scores and all counts), and with a trace of every
token, alternating 30 times in one process; the ratio is the median over the alternations, its interval the middle 95 %
of medians of resampled alternations. At most 1.05 and 1.15 are allowed, to the upper end of the interval. Memory is the
peak of a process that records a million tokens of built-in text, less that of one that runs the model on one batch; at
most 1 GB is allowed. Else the exit status is 1.

    python benchmarks/routing.py [--tokens 1000000] [--only time|memory]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import command, machine, run

RESULTS = Path(__file__).parent / "results" / "routing.json"
LAYERS, EXPERTS, TOP_K, TOKENS = 16, 64, 8, 512
TIME_WIDTHS, NARROWER_WIDTHS, MEMORY_WIDTHS = (512, 256), (256, 128), (64, 32)
"""Of the model and of its experts."""

ALTERNATIONS, RESAMPLES = 30, 10_000
ALLOWED = {"captured": 1.05, "captured and traced": 1.15}
ALLOWED_BYTES = 1_000_000_000
DATA = ["builtin:code", "builtin:prose"]


def main() -> None:
    """Measure both, or one and keep the other, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--child", choices=["plain", "record"])
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model, options.tokens)
        return
    document = json.loads(RESULTS.read_text()) if options.only else {}
    document |= {"schema": "moectl.routing-capture/1", "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    about = {"command": command(), "machine": machine()}
    if options.only != "memory":
        document["time"] = about | time_part(TIME_WIDTHS)
        document["narrower"] = about | time_part(NARROWER_WIDTHS)
    if options.only != "time":
        document["memory"] = about | memory_part(options.tokens)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({name: document[name] for name in ("time", "narrower", "memory")}, indent=1))
    failed = [name for name, each in document["time"]["ratio"].items() if each["high"] > each["allowed"]]
    if document["memory"]["beyond_the_model_bytes"] > ALLOWED_BYTES:
        failed.append("memory")
    if failed:
        sys.exit(f"more than is allowed: {', '.join(failed)}")


def time_part(widths: tuple[int, int]) -> dict[str, Any]:
    """What watching costs in time, in a model of those widths."""
    ratios, plain_seconds = overhead(*widths)
    return {
        "widths": widths,
        "tokens_per_pass": TOKENS,
        "alternations": ALTERNATIONS,
        "plain_seconds": plain_seconds,
        "ratio": {name: {**each, "allowed": ALLOWED[name]} for name, each in ratios.items()},
    }


def memory_part(tokens: int) -> dict[str, Any]:
    """What a long run costs in memory."""
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        arguments = ["--model", directory, "--tokens", str(tokens)]
        plain, record = (run([sys.executable, __file__, "--child", name, *arguments]) for name in ("plain", "record"))
    return {
        "widths": MEMORY_WIDTHS,
        "tokens": tokens,
        "beyond_the_model_bytes": record.peak_rss - plain.peak_rss,
        "allowed_bytes": ALLOWED_BYTES,
        "cpu_seconds": round(record.cpu, 1),
        "said": record.stdout.splitlines(),
    }


def overhead(hidden: int, expert: int) -> tuple[dict[str, dict[str, float]], float]:
    """The median ratio of CPU times to the plain pass, by what is done, and its interval; and the plain pass's time."""
    import torch

    from moectl.routing.capture import Capture
    from moectl.routing.check import check
    from moectl.routing.recorder import Recorder, Rows

    torch.set_num_threads(1)
    model = small_olmoe(hidden, expert)
    ids = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def plain() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        taps = check(model, lambda: model(input_ids=ids).logits).taps
        documents = ALTERNATIONS + 1
        recorders = {
            name: Recorder(
                taps,
                ["text"],
                np.zeros(documents, np.int32),
                np.full(documents, TOKENS),
                kept_N=np.full(documents, name != "captured"),
            )
            for name in ALLOWED
        }

        def watched(recorder: Recorder, document: int) -> float:
            rows = Rows(np.full(TOKENS, document, np.int32), np.arange(TOKENS, dtype=np.int32), ids[0].numpy())
            with Capture(model, taps=taps) as capture:
                return seconds(lambda: (plain(), recorder.add(capture.take(), rows)))

        rows = []
        for document in range(documents):
            row = {"plain": lambda: seconds(plain)}
            row |= {name: lambda r=recorder, d=document: watched(r, d) for name, recorder in recorders.items()}
            order = np.roll(list(row), document)
            rows.append({name: row[name]() for name in order})
    times = {name: np.array([row[name] for row in rows[1:]]) for name in rows[0]}
    ratios = {name: ratio(times[name] / times["plain"]) for name in ALLOWED}
    return ratios, round(float(np.median(times["plain"])), 4)


def seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def ratio(ratios_A: np.ndarray) -> dict[str, float]:
    """The median of some ratios and its interval."""
    drawn = np.random.default_rng(0).choice(ratios_A, (RESAMPLES, len(ratios_A)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(ratios_A)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def small_olmoe(hidden_size: int, intermediate_size: int) -> Any:
    """The model, with random weights."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=264,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=2048,
        eos_token_id=256,
        pad_token_id=257,
    )
    return OlmoeForCausalLM(config).eval()


def save(directory: Path) -> None:
    """The model as a checkpoint that reads bytes."""
    from moectl.data.tokens import byte_tokenizer

    small_olmoe(*MEMORY_WIDTHS).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def child(what: str, model: Path, tokens: int) -> None:
    """Run one batch plainly, or record so many tokens; the parent reads how much memory that took at most."""
    import torch

    from moectl.checkpoint.source import Checkpoint
    from moectl.layerwise.whole import load
    from moectl.routing.run import BATCH_TOKENS, SEQUENCE_LENGTH, Settings, record

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(str(model))
    if what == "plain":
        ids = torch.randint(256, (BATCH_TOKENS // SEQUENCE_LENGTH, SEQUENCE_LENGTH + 1))
        with torch.no_grad():
            load(checkpoint)(input_ids=ids, use_cache=False)
    else:
        record(checkpoint, DATA, Settings(max_tokens=tokens), say=print)


if __name__ == "__main__":
    main()
