"""The expert layer on one CPU core against transformers' own: inference, and forward with backward.

    OMP_NUM_THREADS=1 python benchmarks/cpu_experts.py [--tokens 1,64,2048] [--rounds 41] [--out cpu_experts.json]

Peers are the `eager` and `grouped_mm` experts of transformers' Qwen3-MoE with the same weights. In each round every
layer runs once, in the opposite order of the round before, each on another batch; a time is process CPU time on one
thread, so what else runs on the machine counts little. The gain is the ratio of medians, the faster peer over ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_kernels import cpu, expert_mlp

NEEDED = 1.15
PEERS = ("eager", "grouped_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Batch = tuple[Tensor, Tensor, Tensor]
Layer = Callable[..., Tensor]


def layers(gate_up: Tensor, down: Tensor, infer: bool) -> dict[str, Layer]:
    """Every layer over the same weights; the packed one runs inference only."""
    found: dict[str, Layer] = {}
    for name in PEERS:
        config = Qwen3MoeConfig(
            hidden_size=down.shape[1], moe_intermediate_size=down.shape[2], num_experts=len(down), num_hidden_layers=1
        )
        config._experts_implementation = name
        experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
        found[name] = experts
    leaves = [torch.nn.Parameter(weight) for weight in (gate_up, down)]
    found["ours"] = lambda x, index, weight: expert_mlp(x, *leaves, index, weight)
    if infer:
        found["packed"] = cpu.pack(gate_up, down)
    return found


def step(layer: Layer, batch: Batch, infer: bool) -> float:
    """CPU seconds of one call; a training step asks for the gradient of everything and drops it outside the timing."""
    x, index, weight = batch
    if infer:
        with torch.no_grad():
            started = time.process_time()
            layer(x, index, weight)
            return time.process_time() - started
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    started = time.process_time()
    y = layer(x, index, weight)
    y.backward(torch.ones_like(y))
    seconds = time.process_time() - started
    for parameter in layer.parameters() if isinstance(layer, torch.nn.Module) else layer.__closure__[0].cell_contents:
        parameter.grad = None
    return seconds


def measure(shape: tuple[int, int, int, int], dtype: str, tokens: int, mode: str, rounds: int) -> dict[str, Any]:
    d, f, experts, top_k = shape
    torch.manual_seed(tokens)
    gate_up = (torch.randn(experts, 2 * f, d) * d**-0.5).to(DTYPES[dtype])
    down = (torch.randn(experts, d, f) * f**-0.5).to(DTYPES[dtype])
    infer = mode == "infer"
    compared = layers(gate_up, down, infer)
    # A prime number of batches, so that no layer meets the same one every time.
    batches = [
        (
            torch.randn(tokens, d).to(DTYPES[dtype]),
            torch.rand(tokens, experts).topk(top_k).indices,
            torch.rand(tokens, top_k).softmax(-1).to(DTYPES[dtype]),
        )
        for _ in range(37 if tokens <= 16 else 7)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for layer in compared.values():
        step(layer, batches[0], infer)
    calls = 0
    for k in range(rounds):
        for name in list(compared)[:: 1 if k % 2 else -1]:
            seconds[name].append(step(compared[name], batches[calls % len(batches)], infer))
            calls += 1
    quantiles = {name: statistics.quantiles(times, n=5) for name, times in seconds.items()}
    row: dict[str, Any] = {"mode": mode, "dtype": dtype, "tokens": tokens, "rounds": rounds, "ms": {}, "gain": {}}
    for name, times in seconds.items():
        low, *_, high = quantiles[name]
        row["ms"][name] = {key: 1e3 * t for key, t in (("p20", low), ("p50", statistics.median(times)), ("p80", high))}
    best = min(row["ms"][peer]["p50"] for peer in PEERS)
    row["gain"] = {name: best / row["ms"][name]["p50"] for name in compared if name not in PEERS}
    return row


def show(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {t['p50']:7.3f} ({t['p20']:.3f}-{t['p80']:.3f})" for name, t in row["ms"].items())
    gains = "  ".join(f"{name} x{gain:.2f}" for name, gain in row["gain"].items())
    return f"{row['mode']:5} {row['dtype']:8} {row['tokens']:5}   {times}   {gains}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512,256,32,4", help="hidden size, expert width, experts, top-k")
    parser.add_argument("--tokens", default="1,64,2048")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--mode", default="infer,train")
    parser.add_argument("--rounds", type=int, default=41, help="at least 15; ten times as many for up to 16 tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_experts.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = tuple(int(word) for word in options.shape.split(","))
    rows = []
    print("ms p50 (p20-p80)")
    for mode in options.mode.split(","):
        for dtype in options.dtype.split(","):
            for tokens in (int(word) for word in options.tokens.split(",")):
                rounds = options.rounds * (10 if tokens <= 16 else 1)
                rows.append(measure(shape, dtype, tokens, mode, rounds))
                print(show(rows[-1]), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers")}
    result = {
        "command": command(), "machine": machine(), **versions, "threads": 1, "clock": "process CPU time",
        "shape": dict(zip(("hidden", "width", "experts", "top_k"), shape, strict=True)), "needed": NEEDED, "rows": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        for name, gain in row["gain"].items():
            if row["mode"] == "infer" and gain < NEEDED:
                print(f"below x{NEEDED}: {name} {row['dtype']} at {row['tokens']} tokens, x{gain:.2f}")


if __name__ == "__main__":
    main()
