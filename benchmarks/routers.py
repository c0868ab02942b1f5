"""Routers in training: one small model per seed, trained with each router for as many steps on the same data.

The decoder is a Mixtral of a few layers from scratch, on the corpus of `moectl quickstart`. Soft MoE needs an encoder,
and is put into a Switch Transformer that fills in spans of the same text. Each is compared with its family's router.

    python benchmarks/routers.py [--work DIRECTORY] [--only NAME] [--seeds 3] [--steps 200]

Measured in use (no noise, no losses): the loss of held-out text in nats per predicted token, and how evenly the experts
are loaded there; in training: tokens per second, the median over the steps. Runs that DIRECTORY has are not made again.
One thread; differences to the family's own router are paired by seed, their intervals are 95 % of Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import command, machine
from scipy.stats import t as student
from torch.nn.functional import cross_entropy
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import read_documents
from moectl.data.tokens import BYTE_EOS_ID, BYTE_PAD_ID, byte_tokenizer, token_rows
from moectl.families.tiny_moe import tiny_moe
from moectl.integrations.transformers import load
from moectl.layerwise.experts import takes_choice
from moectl.quickstart import DATA
from moectl.training.metrics import read_metrics
from moectl.training.model import load_encoding, load_spans
from moectl.training.recipe import TrainRecipe
from moectl.training.run import METRICS, train
from moectl.training.world import World

RESULTS = Path(__file__).parent / "results" / "routers-training.json"
DECODER = (
    "family",
    "noisy-top-k",
    "switch",
    "expert-choice",
    "s-base",
    "x-moe",
    "deepseek-v3:scale=1",
    "evo-moe",
    "stable-moe",
    "grin",
    "peer:heads=4,top_k=8",
    "mod:share=0.5",
)
ENCODER = ("family", "soft-moe:slots=12")
GROUPS = {"decoder": DECODER, "encoder-decoder": ENCODER}
LENGTH, BATCH, RATE, HELDOUT_ROWS, CORPUS_BYTES = 128, 8, 3e-3, 96, 2_000_000


def main() -> None:
    """Make the runs that are missing, write what came out, and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("routers-training"))
    parser.add_argument("--only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for group, routers in GROUPS.items():
        wanted = [router for router in routers if options.only in (None, router.partition(":")[0])]
        for router in wanted:
            runs = [kept(options.work, group, router, seed, options.steps) for seed in range(options.seeds)]
            rows.append({"model": group, "router": router, "runs": runs})
    for row in rows:
        own = next((other for other in rows if other["model"] == row["model"] and other["router"] == "family"), None)
        row |= summary(row["runs"], own["runs"] if own else None)
        difference = row["difference"] and "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["difference"])
        print(
            f"{row['model']:15} {row['router']:22} loss {row['loss']:.4f} +- {row['loss_spread']:.4f}  {difference}  "
            f"max vio {row['max_vio']:.2f}  effective {row['effective_experts']:.1f} of {row['experts']}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
    if options.only is None:
        about = {"schema": "moectl.routers-training/1", "command": command(), "machine": machine()}
        sizes = {"steps": options.steps, "batch": BATCH, "length": LENGTH, "heldout_tokens": HELDOUT_ROWS * LENGTH}
        RESULTS.write_text(json.dumps({**about, **sizes, "data": list(DATA), "rows": rows}, indent=2) + "\n")


def kept(work: Path, group: str, router: str, seed: int, steps: int) -> dict[str, float]:
    """A run, from its file if there is one."""
    file = work / f"{group}-{router.replace(':', '-')}-{seed}-{steps}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{group}, {router}, seed {seed}", file=sys.stderr)
        file.write_text(json.dumps(run(work, group, router, seed, steps)) + "\n")
    found: dict[str, float] = json.loads(file.read_text())
    return found


def run(work: Path, group: str, router: str, seed: int, steps: int) -> dict[str, float]:
    """Train one model with one router and measure it."""
    source, out = work / f"{group}-{seed}", work / f"{group}-{router.replace(':', '-')}-{seed}"
    if not source.exists():
        save(group, seed, source)
    own = router == "family"
    recipe = TrainRecipe(
        data=corpus(work),
        steps=steps,
        batch_size=BATCH,
        sequence_length=LENGTH,
        learning_rate=RATE,
        warmup=steps // 10,
        aux_loss=0.01 if own or router.startswith(("mod", "soft-moe")) else 0.0,  # some layers keep the family's
        router=None if own else router,
        seed=seed,
    )
    train(Checkpoint.open(source), recipe, out, World(0, 1, torch.device("cpu")), save_every=steps)
    speeds = [step["tokens_per_second"] for step in read_metrics(out / METRICS)]
    return {**measured(out, corpus(work)), "tokens_per_second": statistics.median(speeds)}


def corpus(work: Path) -> tuple[str, ...]:
    """The beginning of each part of the corpus as a file: the built-in text is parsed anew whenever it is read."""
    files = [work / f"{spec.partition(':')[2]}.jsonl" for spec in DATA]
    for spec, file in zip(DATA, files, strict=True):
        if not file.exists():
            lines, size = [], 0
            for document in read_documents([spec], "all"):
                lines.append(json.dumps({"text": document.text}) + "\n")
                size += len(lines[-1])
                if size > CORPUS_BYTES:
                    break
            file.write_text("".join(lines))
    return tuple(map(str, files))


def save(group: str, seed: int, path: Path) -> None:
    """A model from scratch, and its tokenizer: the bytes, and for the encoder T5's sentinels."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model: Any
    if group == "decoder":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.04}
        model = tiny_moe("mixtral", seed, vocab_size=258, bos_token_id=None, eos_token_id=BYTE_EOS_ID, **sizes)
    else:
        tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(8)])
        config = SwitchTransformersConfig(
            vocab_size=272,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=1,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=8,
            expert_capacity=LENGTH,
            dropout_rate=0.0,
            eos_token_id=BYTE_EOS_ID,
            pad_token_id=BYTE_PAD_ID,
            decoder_start_token_id=BYTE_PAD_ID,
        )
        model = SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.no_grad()
def measured(path: Path, data: tuple[str, ...]) -> dict[str, float]:
    """Loss and balance of a model in use, on held-out text."""
    checkpoint = Checkpoint.open(path)
    encoding, spans = load_encoding(checkpoint), load_spans(checkpoint)
    model = load(path).eval()
    loads = watched(model)
    total = count = 0.0
    for spec in data:
        documents = read_documents([spec], "heldout")
        rows = token_rows(
            documents, encoding.encode, eos_id=encoding.eos_id, sequence_length=LENGTH, seed=0, repeat=True
        )
        token_BL = np.stack([row for row, _ in islice(rows, HELDOUT_ROWS // len(data))])
        inputs: dict[str, torch.Tensor] = {}
        if spans:
            source_BS, token_BL = spans.pairs(token_BL, seed=0)
            inputs["input_ids"] = torch.from_numpy(source_BS)
        inputs["decoder_input_ids" if spans else "input_ids"] = read = torch.from_numpy(token_BL)
        logits_TV = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits_TV, read[:, 1:].flatten(), reduction="sum"))
        count += read[:, 1:].numel()
    balance = [spread(load_E) for load_E in loads.values()]
    means = {name: statistics.fmean(each[name] for each in balance) for name in balance[0]}
    return {"loss": total / count, **means}


def watched(model: Any) -> dict[str, Any]:
    """How many tokens each expert of each layer works on, counted as the model runs."""
    loads: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not takes_choice(module):
            continue

        def count(module: Any, given: Any, *, name: str = name) -> None:
            _, index, weight = given
            if index.ndim == 3:  # Switch's mask
                load_E = index.sum((0, 1))
            else:
                load_E = torch.bincount(index[weight != 0], minlength=module.num_experts)
            loads[name] = loads.get(name, 0) + load_E

        module.register_forward_pre_hook(count)
    return loads


def spread(load_E: torch.Tensor) -> dict[str, float]:
    """How far the busiest expert is above the mean, and how many equally loaded ones have the same entropy."""
    share_E = load_E.double() / load_E.sum()
    entropy = -torch.special.xlogy(share_E, share_E).sum().item()
    return {
        "max_vio": share_E.max().item() * len(share_E) - 1,
        "effective_experts": math.exp(entropy),
        "experts": len(share_E),
    }


def summary(runs: list[dict[str, float]], own: list[dict[str, float]] | None) -> dict[str, Any]:
    """Means over the seeds, the spread of the loss (standard deviation), and the difference to the family's router."""
    means = {name: statistics.fmean(each[name] for each in runs) for name in runs[0]}
    losses = [each["loss"] for each in runs]
    found: dict[str, Any] = {**means, "loss_spread": statistics.stdev(losses) if len(losses) > 1 else 0.0}
    found["difference"] = None
    if own is not None and own is not runs and len(runs) > 1:
        gaps = [one - other["loss"] for one, other in zip(losses, own, strict=True)]
        mean, half = (
            statistics.fmean(gaps),
            student.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps)),
        )
        found["difference"] = {"mean": mean, "low": mean - half, "high": mean + half}
    return found


if __name__ == "__main__":
    main()
