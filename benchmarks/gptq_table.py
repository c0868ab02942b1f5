"""Errors of ternary and uniform GPTQ on known inputs, next to numbers from elsewhere, and how fast they come.

    OMP_NUM_THREADS=1 python benchmarks/gptq_table.py [--matrices 4] [--rows 64] [--out gptq_table.json]

Weights are normal. Inputs are too: the i-th eigenvalue of their covariance is i^-decay, its eigenvectors are random,
and there are four times as many tokens as inputs. `known` are numbers of one run of another implementation on such
inputs; the exit status is 1 where the mean over matrices misses one by more than 5 %. With `outliers` columns have
different sizes, exp(0.7 z) for normal z, as activations of models do; with `tail` weights are of Student's t with so
many degrees of freedom. There is also what remains on inputs that were not seen.
Errors are those of outputs, squared, relative to outputs. Speed is CPU time of one thread at 16 matrices of 768 x 2048.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from torch import Tensor

from moectl.compress.quantise.gptq import factor, sweep
from moectl.compress.quantise.levels import Levels, of_the_paper
from moectl.compress.quantise.method import Method, method
from moectl.compress.quantise.rate import bits

RESULTS = Path(__file__).parent / "results"
BF16 = torch.bfloat16
KNOWN = {
    (1024, 0.5): {"paper": 0.568, "means": 0.448},
    (1024, 1.0): {"paper": 0.263, "means": 0.213},
    (2048, 0.5): {"paper": 0.602, "means": 0.476},
}
WITHIN = 0.05
SPEED = (16, 768, 2048)
OUTLIERS, TAIL = 0.7, 5


def problem(matrices: int, rows: int, width: int, decay: float, outliers: float, tail: int) -> tuple[Tensor, ...]:
    """Weights [G, R, N], second moments of the inputs seen, and those of all inputs there could be."""
    random = torch.Generator().manual_seed(width + int(100 * decay))
    scale = torch.arange(1, width + 1) ** (-decay / 2)
    seen, true = [], []
    for _ in range(matrices):
        turn = torch.linalg.qr(torch.randn(width, width, generator=random))[0] * scale
        size = torch.exp(outliers * torch.randn(width, generator=random))[:, None]
        inputs = torch.randn(4 * width, width, generator=random) @ (size * turn).mT
        seen.append(inputs.mT @ inputs / len(inputs))
        true.append(size * turn @ (size * turn).mT)
    weight = torch.randn(matrices, rows, width, generator=random) * 0.02
    if tail:
        weight /= torch.randn(matrices, rows, width, tail, generator=random).square().mean(3).sqrt()
    return weight, torch.stack(seen), torch.stack(true)


def error(weight: Tensor, dense: Tensor, moments: Tensor) -> float:
    """Mean over matrices."""
    lost, whole = ((part @ moments * part).sum((1, 2)) for part in (weight - dense, weight))
    return float((lost / whole).mean())


def told(chosen: Method, weight: Tensor, seen: Tensor, true: Tensor) -> dict[str, float]:
    """What a quantiser makes of matrices."""
    piece = chosen.quantise(weight, seen, None)
    dense = chosen.dense(piece)
    return {
        "bits": round(piece["bits_G"].mean().item(), 3),
        "zeros": round(piece["zeros_G"].mean().item(), 3),
        "error": round(error(weight, dense, seen), 4),
        "error_unseen": round(error(weight, dense, true), 4),
    }


def with_factor(target: float, weight: Tensor, seen: Tensor, true: Tensor) -> dict[str, float]:
    """Thresholds of the paper times one factor, levels the means beyond them, at so many bits."""
    factored = factor(seen, 0.1)
    low, high = 0.2, 2.0

    def swept(levels: Levels) -> Tensor:
        return sweep(weight.mT.contiguous(), factored, lambda target, _: levels.value(target))[0]

    for _ in range(9):
        times = (low + high) / 2
        rounded = swept(of_the_paper(weight, BF16, times=times, means=True))
        rate = bits(rounded.sign().to(torch.int8).mT, "tunstall", BF16).mean().item()
        low, high = (low, times) if rate < target else (times, high)
    return {
        "bits": round(rate, 3),
        "zeros": round((rounded == 0).float().mean().item(), 3),
        "error": round(error(weight, rounded.mT, seen), 4),
        "error_unseen": round(error(weight, rounded.mT, true), 4),
    }


def table(matrices: int, rows: int) -> list[dict[str, Any]]:
    """All settings."""
    settings = [(width, decay, 0.0, 0) for width, decay in KNOWN] + [
        (1024, 0.7, OUTLIERS, 0),
        (1024, 0.7, OUTLIERS, TAIL),
    ]
    lines = []
    for width, decay, outliers, tail in settings:
        parts = problem(matrices, rows, width, decay, outliers, tail)
        results = {"paper": told(method(None, compat=True, dtype=BF16), *parts)}
        results["means"] = told(method(None, means=True, dtype=BF16, stretched=False), *parts)
        for target in (results["paper"]["bits"], 0.8):
            results[f"factor {target}"] = with_factor(target, *parts)
            results[f"spread {target}"] = told(method(target, dtype=BF16, stretched=False), *parts)
        for grid in (2, 3, 4):
            results[f"grid {grid}"] = told(method(grid, dtype=BF16), *parts)
        lines.append({"width": width, "decay": decay, "outliers": outliers, "tail": tail, "results": results})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def speed() -> dict[str, float]:
    """CPU seconds."""
    torch.set_num_threads(1)
    matrices, rows, width = SPEED
    weight = torch.randn(SPEED) * 0.02
    inputs = torch.randn(matrices, 2 * width, width) * torch.exp(OUTLIERS * torch.randn(matrices, 1, width))
    moments = inputs.mT @ inputs
    step = torch.full((matrices, rows), 0.02)
    transposed = weight.mT.contiguous()
    factored = factor(moments, 0.1)

    def seconds(work: Callable[[], Any]) -> float:
        started = time.process_time()
        work()
        return round(time.process_time() - started, 2)

    times = {
        "factor": seconds(lambda: factor(moments, 0.1)),
        "sweep": seconds(lambda: sweep(transposed, factored, lambda target, _: (target / step).round() * step)),
    }
    for name, asked in {"paper": None, "0.8": 0.8, "2": 2, "4": 4}.items():
        chosen = method(asked, compat=name == "paper", dtype=BF16)
        times[f"quantise {name}"] = seconds(lambda chosen=chosen: chosen.quantise(weight, moments, None))
    return times


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "gptq_table.json")
    options = parser.parse_args()
    lines, times = table(options.matrices, options.rows), speed()
    columns = SPEED[0] * SPEED[2]
    document = {
        "schema": "moectl.gptq_table/1",
        "command": command(),
        "machine": machine(),
        "matrices": options.matrices,
        "rows": options.rows,
        "known": {f"{width} {decay}": known for (width, decay), known in KNOWN.items()},
        "table": lines,
        "speed_shape": list(SPEED),
        "cpu_seconds": times,
        "columns_times_matrices_per_second": {what: round(columns / each) for what, each in times.items()},
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({key: document[key] for key in ("cpu_seconds", "columns_times_matrices_per_second")}, indent=1))
    missed = [
        (line["width"], line["decay"], what, line["results"][what]["error"], known)
        for line in lines
        if not line["outliers"]
        for what, known in KNOWN[line["width"], line["decay"]].items()
        if abs(line["results"][what]["error"] / known - 1) > WITHIN
    ]
    if missed:
        sys.exit(f"missed: {missed}")


if __name__ == "__main__":
    main()
