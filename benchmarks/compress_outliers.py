"""Ternary experts of a model with outliers: at what nothing is asked for, and with the paper's thresholds.

    python benchmarks/compress_outliers.py [--work DIR] [--seeds 0 1 2]

The models are those of `compress_peers.py`, as they are and with outliers: each channel that experts read is made
exp(0.7 z) times as large where they are given it, for normal z, and each hidden neuron where it comes about; the
weights that multiply them are made as much smaller. That computes the same, and is as uneven as channels of large
models are. The paper's thresholds are half of a row's extremes, so with outliers nearly all weights become zeros.
Only experts are quantised. Losses are in nats a token of the same held-out documents.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import compress_peers_model as the_model
from compress_peers import SAMPLES, difference, loss, stored_bytes
from compress_peers_score import score
from machine import command, machine, run

RESULTS = Path(__file__).parent / "results" / "compress_outliers.json"
SIZE = 0.7
WAYS = {"ternary": (), "ternary, paper's thresholds": ("--qmoe-compat",)}


def main() -> None:
    """Make the models that are not there, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="where models are made and kept; nowhere when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("plain", "outliers"):
            rows = []
            for seed in options.seeds:
                place = (options.work or Path(scratch)).resolve() / f"seed-{seed}"
                place.mkdir(parents=True, exist_ok=True)
                the_model.make(place, seed, SAMPLES)
                rows += measured(place if kind == "plain" else uneven(place, seed), kind, seed)
            models[kind] = summarised(rows)
    document = {"schema": "moectl.compress-outliers/1", "command": command(), "machine": machine(), "models": models}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(models, indent=1))


def uneven(place: Path, seed: int) -> Path:
    """A copy of a place whose model has outliers, and computes the same."""
    import torch
    from safetensors.torch import load_file, save_file

    found = Path(shutil.copytree(place / "model", place / "outliers" / "model", dirs_exist_ok=True)).parent
    for name in ("calibration.jsonl", "heldout.npz"):
        shutil.copy(place / name, found)
    file = found / "model" / "model.safetensors"
    tensors, random = load_file(file), torch.Generator().manual_seed(seed)

    def scale(name: str, factor: Any) -> None:
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    def sizes(count: int) -> Any:
        return torch.exp(SIZE * torch.randn(count, generator=random))

    for layer in range(the_model.LAYERS):
        prefix, channel = f"model.layers.{layer}", sizes(the_model.WIDTH)
        scale(f"{prefix}.post_attention_layernorm.weight", channel)
        scale(f"{prefix}.mlp.gate.weight", 1 / channel)
        for expert in (f"{prefix}.mlp.experts.{number}" for number in range(the_model.EXPERTS)):
            neuron = sizes(the_model.EXPERT_WIDTH)
            scale(f"{expert}.gate_proj.weight", 1 / channel)
            scale(f"{expert}.up_proj.weight", neuron[:, None] / channel)
            scale(f"{expert}.down_proj.weight", 1 / neuron)
    save_file(tensors, file, {"format": "pt"})
    return found


def measured(place: Path, kind: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one model: itself, and every way; what was measured is kept."""
    rows = []
    for name, arguments in {"bf16": None, **WAYS}.items():
        kept = place / f"{name}.json"
        if not kept.exists():
            print(f"seed {seed}, {kind}: {name}", flush=True)
            kept.write_text(json.dumps(score(place, None) if arguments is None else compressed(place, arguments)))
        rows.append({**json.loads(kept.read_text()), "name": name, "seed": seed})
    return rows


def compressed(place: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Compress, decompress, score."""
    out, dense, plain = place / "out", place / "dense", place / "plain.safetensors"
    for path in (out, dense):
        shutil.rmtree(path, ignore_errors=True)
    data = ["--data", str(place / "calibration.jsonl"), "--samples", str(SAMPLES), "--seq-len", str(the_model.LENGTH)]
    words = ["compress", "qmoe", str(place / "model"), "-o", str(out), *data, "--dense", "bf16", "--no-eval", "--quiet"]
    for each in ([*words, *arguments], ["decompress", str(out), "-o", str(dense), "--quiet"]):
        run([sys.executable, "-m", "moectl", *each], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    the_model.extract(dense, plain)
    return {"bits_per_expert_weight": 8 * stored_bytes(out) / the_model.expert_weights(), **score(place, plain)}


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits, and how much more each way loses than the model itself, seeds together."""
    return [
        {
            "name": name,
            "bits_per_expert_weight": sum(row["bits_per_expert_weight"] for row in own) / len(own),
            "losses": [loss(row) for row in own],
            "more": difference(rows, name, "bf16"),
        }
        for name in WAYS
        if (own := [row for row in rows if row["name"] == name])
    ]


if __name__ == "__main__":
    main()
