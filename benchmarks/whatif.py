"""How long every what-if takes, and how much memory, on a trace of 100,000 tokens and on one of a million.

The trace has 16 layers of 64 experts, 8 of them for a token, with weights and scores; loads are skewed, domains differ,
and half of what a score is made of stays from one token to the next. Four layers are drawn, and the others are these
with their experts renumbered. Documents have 1,000 tokens and one of four domains. Its arrays are mapped from disk, as
those of a saved trace are. Each what-if runs in a process of its own, with one thread, after a run on two documents, so
that its loops are compiled. Seconds are CPU time. The peak is of all that was resident; beside it how much of that were
mapped pages at the end, which the system can take back.

At 100,000 tokens all together may take 60 s and each 1 GB; a million may take 15 times as long as 100,000 do. Else the
exit status is 1. With --only the other results are kept.

    python benchmarks/whatif.py [--tokens 100000,1000000] [--only NAME,NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import command, machine, run

from moectl.routing.whatif.registry import WHAT_IFS, find
from moectl.traces.trace import Point, Routed, RoutingTrace, Tokens

RESULTS = Path(__file__).parent / "results" / "whatif.json"
LAYERS, DRAWN, EXPERTS, TOP_K, DOCUMENT = 16, 4, 64, 8, 1000
DOMAINS = ("code", "prose", "sums", "talk")
STAYS = 0.5
ALLOWED_SECONDS, ALLOWED_BYTES, ALLOWED_GROWTH = 60, 1_000_000_000, 15


def main() -> None:
    """Measure every what-if at both sizes and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="100000,1000000")
    parser.add_argument("--only")
    parser.add_argument("--child")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.trace)
        return
    names = options.only.split(",") if options.only else [each.name for each in WHAT_IFS]
    document = json.loads(RESULTS.read_text()) if options.only and RESULTS.exists() else {"tokens": {}}
    for tokens in options.tokens.split(","):
        with tempfile.TemporaryDirectory() as directory:
            make(Path(directory), int(tokens))
            found = document["tokens"].setdefault(tokens, {})
            for name in names:
                found[name] = measured(name, Path(directory))
                print(f"{tokens} {name} {found[name]}", flush=True)
    document |= {
        "schema": "moectl.what-if-cost/1",
        "command": command(),
        "machine": machine(),
        "shape": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "document_tokens": DOCUMENT},
        "allowed": {"seconds": ALLOWED_SECONDS, "bytes": ALLOWED_BYTES, "growth": ALLOWED_GROWTH},
        "seconds": {
            tokens: round(sum(each["cpu_seconds"] for each in found.values()), 1)
            for tokens, found in document["tokens"].items()
        },
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    failed = over({int(tokens): found for tokens, found in document["tokens"].items()})
    if failed:
        sys.exit(f"more than is allowed: {', '.join(failed)}")


def over(found: dict[int, dict[str, Any]]) -> list[str]:
    """What takes more than is allowed."""
    smallest, *larger = sorted(found)
    total = {tokens: sum(each["cpu_seconds"] for each in found[tokens].values()) for tokens in found}
    failed = [name for name, each in found[smallest].items() if each["peak_bytes"] > ALLOWED_BYTES]
    if total[smallest] > ALLOWED_SECONDS:
        failed.append("seconds of all together")
    for tokens in larger:
        growth = ALLOWED_GROWTH / 10 * tokens / smallest
        failed += [
            f"{name} at {tokens:,} tokens"
            for name, each in found[tokens].items()
            if each["cpu_seconds"] > growth * max(found[smallest][name]["cpu_seconds"], 0.1)
        ]
    return failed


def measured(name: str, directory: Path) -> dict[str, Any]:
    """One what-if in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = run([sys.executable, __file__, "--child", name, "--trace", str(directory)], env=environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_bytes": done.peak_rss}


def child(name: str, directory: Path) -> None:
    """Run it twice, the second time on all tokens, and say how long that took."""
    module, trace = find(name).load(), mapped(directory)
    module.run(part(trace, 2 * DOCUMENT), module.Options())
    started, started_cpu = time.perf_counter(), time.process_time()
    finding = module.run(trace, module.Options())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    lines = Path("/proc/self/status").read_text().splitlines()
    pages = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))
    said = {
        "cpu_seconds": round(cpu_seconds, 2),
        "seconds": round(seconds, 2),
        "mapped_bytes": pages,
        "said": finding.headline,
    }
    print(json.dumps(said))


def make(directory: Path, tokens: int) -> None:
    """Write the arrays of a trace: for every layer its experts, weights and scores."""
    documents = tokens // DOCUMENT
    generator = np.random.default_rng(0)
    domain_N = np.arange(documents) % len(DOMAINS)
    for drawn in range(DRAWN):
        liked_DE = 0.5 * (generator.normal(size=(1, EXPERTS)) + generator.normal(size=(len(DOMAINS), EXPERTS)))
        liked_NE, now_NE = liked_DE[domain_N].astype(np.float32), np.zeros((documents, EXPERTS), np.float32)
        score_NPE = np.empty((documents, DOCUMENT, EXPERTS), np.float16)
        for place in range(DOCUMENT):
            fresh_NE = generator.standard_normal((documents, EXPERTS), np.float32)
            now_NE = STAYS * now_NE + (1 - STAYS**2) ** 0.5 * fresh_NE
            score_NPE[:, place] = now_NE + liked_NE
        score_TE = score_NPE.reshape(tokens, EXPERTS)
        index_TK, weight_TK = np.empty((tokens, TOP_K), np.int16), np.empty((tokens, TOP_K), np.float16)
        for start in range(0, tokens, 1 << 16):
            at = slice(start, start + (1 << 16))
            wide_TE = score_TE[at].astype(np.float32)
            order_TK = np.argsort(-wide_TE, axis=1)[:, :TOP_K]
            chosen_TK = np.exp(np.take_along_axis(wide_TE, order_TK, 1))
            index_TK[at] = order_TK
            weight_TK[at] = chosen_TK / chosen_TK.sum(1, keepdims=True)
        for layer in range(drawn, LAYERS, DRAWN):
            old_E = generator.permutation(EXPERTS)
            new_E = np.argsort(old_E).astype(np.int16)
            for name, array in (("index", new_E[index_TK]), ("weight", weight_TK), ("score", score_TE[:, old_E])):
                np.save(directory / f"{layer}.{name}.npy", array)


def mapped(directory: Path) -> RoutingTrace:
    """The trace, its arrays on disk."""
    layers = []
    for layer in range(LAYERS):
        arrays = (np.load(directory / f"{layer}.{name}.npy", mmap_mode="r") for name in ("index", "weight", "score"))
        point = Point(f"model.layers.{layer}.mlp.experts", layer, EXPERTS, TOP_K, score_kind="logits")
        layers.append(Routed(point, *(array.view(np.ndarray) for array in arrays)))
    tokens = len(layers[0].index_TK)
    documents = tokens // DOCUMENT
    token_T = np.random.default_rng(1).zipf(1.3, tokens).clip(max=50_000).astype(np.int32)
    described = Tokens(
        token_T,
        np.repeat(np.arange(documents, dtype=np.int32), DOCUMENT),
        np.tile(np.arange(DOCUMENT, dtype=np.int32), documents),
        np.zeros(tokens, np.uint8),
        (np.arange(documents) % len(DOMAINS)).astype(np.int32),
        DOMAINS,
    )
    return RoutingTrace(described, tuple(layers))


def part(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The first tokens, still mapped."""
    layers = [
        Routed(each.point, each.index_TK[:tokens], each.weight_TK[:tokens], each.score_TE[:tokens])
        for each in trace.layers
    ]
    return RoutingTrace(trace.tokens.where(np.arange(len(trace)) < tokens), tuple(layers))


if __name__ == "__main__":
    main()
