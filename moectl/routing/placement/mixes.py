"""Mixes of parallelism for a layer of experts: over how many GPUs experts are spread, sliced and copied, at what cost.

Tutel (arXiv 2206.03382; `tutel/impls/moe_layer.py`) keeps one layout of the weights and chooses r: 0 gathers all
experts on every GPU, 1 sends tokens to experts whose slices are gathered, W / E sends each token to all slices of its
experts.
DeepSpeed-MoE (arXiv 2201.05596) mixes expert parallelism, slicing and copies. Both are points of expert x slice x copy.
Legend: B batches, C copies, E experts, R ranks that experts are spread over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moectl.routing.placement.hardware import Hardware
from moectl.routing.placement.packing import contiguous


@dataclass(frozen=True, slots=True)
class Mix:
    """How a layer's experts lie on GPUs.

    Attributes:
        ranks: over how many GPUs, or groups of slices, the experts are spread.
        slices: over how many GPUs each expert is cut, along its width.
        copies: how many times all of it is there, each for its part of the tokens.
    """

    ranks: int
    slices: int
    copies: int

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.ranks * self.slices * self.copies

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.ranks} x {self.slices} x {self.copies}"

    @property
    def words(self) -> str:
        """The same in words."""
        copies = f", {self.copies} times" if self.copies > 1 else ""
        if self.ranks == self.slices == 1:
            return "all experts on every GPU"
        if self.ranks == 1:
            return f"all experts cut into {self.slices} slices{copies}"
        return f"experts spread over {self.ranks}{f' x {self.slices} slices' if self.slices > 1 else ' GPUs'}{copies}"

    def tutel(self, num_experts: int) -> int | None:
        """What Tutel calls r, if it is one of its choices."""
        if self.ranks == self.slices == 1:
            return 0
        if self.ranks == num_experts or (self.slices == self.copies == 1):
            return self.slices
        return None


def mixes(gpus: int, num_experts: int, intermediate_size: int) -> Iterator[Mix]:
    """Every mix for that many GPUs, the most ranks first."""
    for ranks in range(min(gpus, num_experts), 0, -1):
        for slices in range(1, gpus // ranks + 1):
            if gpus % (ranks * slices) == 0 and intermediate_size % slices == 0:
                yield Mix(ranks, slices, gpus // (ranks * slices))


def busiest(mix: Mix, load_BCE: np.ndarray) -> np.ndarray:
    """The assignments of the busiest rank of any copy, of loads of each copy's tokens [B]."""
    share_ER = contiguous(load_BCE.shape[-1], mix.ranks).share_EG
    return np.asarray((load_BCE @ share_ER).max((1, 2)))


def seconds(
    mix: Mix,
    largest_B: np.ndarray,
    tokens: int,
    num_experts: int,
    hardware: Hardware,
    memory_gb_per_s: float,
    *,
    sharded: bool,
) -> np.ndarray:
    """What computing, exchanging tokens, and moving weights take for batches of `tokens`, nothing overlapped [3, B].

    Args:
        largest_B: the assignments of the busiest rank.
        memory_gb_per_s: what a GPU reads of its memory in a second.
        sharded: copies hold a part of the weights each and gather the rest when they compute (Tutel, ZeRO); else each
            holds all.
    """
    cost, local = hardware.cost, expert_bytes(mix, num_experts, hardware)
    reading_s = hardware.passes * local / (memory_gb_per_s * 1e9)
    compute_B = np.maximum(largest_B * cost.compute_s / mix.slices, reading_s)
    if mix.ranks > 1:
        exchange_B = largest_B * (1 - 1 / mix.ranks) * cost.exchange_s
    else:  # slices of all experts on every GPU: tokens are gathered, not sent to experts one by one
        exchange_B = np.full(len(largest_B), tokens / mix.copies * (1 - 1 / mix.slices) * cost.exchange_s)
    times = 1 + hardware.training if sharded else 2 * hardware.training
    others_s = (1 - 1 / mix.copies) * local / (hardware.gb_per_s * 1e9)
    return np.stack([compute_B, exchange_B, np.full(len(largest_B), times * others_s)])


def expert_bytes(mix: Mix, num_experts: int, hardware: Hardware) -> float:
    """Of the experts' weights that a GPU computes with, in one layer."""
    return -(-num_experts // mix.ranks) * hardware.expert_bytes / mix.slices


def held_bytes(mix: Mix, num_experts: int, hardware: Hardware, *, sharded: bool) -> float:
    """Of the experts' weights that a GPU holds, in one layer, without gradients and what an optimiser keeps."""
    return expert_bytes(mix, num_experts, hardware) / (mix.copies if sharded else 1)
