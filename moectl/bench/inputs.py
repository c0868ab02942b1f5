"""Random weights and inputs of one expert layer, in several sets so that no cache is warm with the last call's.

Legend: T tokens, D hidden_size, F expert width, G = 2F, E experts, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.bench import routing
from moectl.bench.device import cache_bytes, free_bytes
from moectl.bench.shapes import Shape
from moectl.errors import MachineError
from moectl.report.output import size

MAX_SETS = 16


@dataclass(frozen=True)
class Weights:
    """The experts: gate_up [E, G, D] with the gate rows first, down [E, D, F]; scaled so that outputs are near 1."""

    shape: Shape
    gate_up_EGD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True)
class Batch:
    """What one call gets: x [T, D], index [T, K] int64, weight [T, K], dy [T, D]; rows per expert of its routing."""

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    dy_TD: Tensor
    counts: list[int]

    @property
    def rows(self) -> int:
        """S, routed rows that an expert here takes."""
        return sum(self.counts)

    @property
    def active(self) -> int:
        """A, experts with at least one row."""
        return sum(count > 0 for count in self.counts)


def make_weights(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, train: bool) -> list[Weights]:
    """As many copies of the experts, each with its own numbers, as it takes to outgrow the cache twice.

    Raises:
        MachineError: one copy does not fit into memory.
    """
    one = shape.weights * dtype.itemsize
    free = free_bytes(device)
    need = one * (2 if train else 1)
    if need > 0.8 * free:
        raise MachineError(
            f"The experts of {shape.name} take {size(need)} in {str(dtype).removeprefix('torch.')}.",
            f"The {device.type} has {size(free)} free.",
            "Use --tp-size, a smaller shape or a narrower dtype.",
        )
    copies = max(1, min(8, math.ceil(2 * cache_bytes(device) / one)))
    generator = torch.Generator(device).manual_seed(seed)
    d, f, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def normal(rows: int, columns: int) -> Tensor:
        out = torch.empty(experts, rows, columns, dtype=dtype, device=device)
        for matrix in out:  # one expert at a time: a float32 scratch of everything could be the largest tensor of all
            matrix.copy_(torch.randn(rows, columns, generator=generator, device=device) / columns**0.5)
        return out.requires_grad_(train)

    return [Weights(shape, normal(2 * f, d), normal(d, f)) for _ in range(copies)]


def make_batches(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, draw: routing.Draw, seed: int, train: bool
) -> list[Batch]:
    """Enough sets of inputs that what one call touched has left the cache when its turn comes again."""
    touched = dtype.itemsize * (
        2 * tokens * shape.hidden_size + min(1.0, tokens * shape.top_k / shape.num_experts) * shape.weights
    )
    sets = max(2, min(MAX_SETS, math.ceil(3 * cache_bytes(device) / touched)))
    on_cpu, on_device = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

    def one() -> Batch:
        index_TK = draw(tokens, on_cpu)
        weight_TK = routing.weights(index_TK, on_cpu).to(device=device, dtype=dtype)
        x_TD, dy_TD = (
            torch.randn(tokens, shape.hidden_size, generator=on_device, device=device).to(dtype) for _ in range(2)
        )
        counts = routing.counts(index_TK, shape.num_experts)
        return Batch(x_TD.requires_grad_(train), index_TK.to(device), weight_TK.requires_grad_(train), dy_TD, counts)

    return [one() for _ in range(sets)]
