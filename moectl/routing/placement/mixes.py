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

    def tutel(self, num_experts: int) -> int | None:
        """What Tutel calls r, if it is one of its choices."""
        if self.ranks == self.slices == 1:
            return 0
        if self.ranks == num_experts or (self.slices == self.copies == 1):
            return self.slices
        return None


@dataclass(frozen=True, slots=True)
class Machine:
    """A layer of gated experts, and GPUs.

    Attributes:
        hidden_size, intermediate_size: of the model and of an expert.
        value_bytes: of a weight and of a feature.
        flops, link_bytes, memory_bytes: what a GPU computes, sends or receives, and reads, in a second.
        training: three passes and four exchanges of tokens, and gradients; else one and two, and none.
        sharded: copies hold a part of the weights each and gather the rest when they compute (Tutel, ZeRO); else each
            holds all.
    """

    hidden_size: int
    intermediate_size: int
    value_bytes: float
    flops: float
    link_bytes: float
    memory_bytes: float
    training: bool
    sharded: bool

    @property
    def expert_bytes(self) -> float:
        """Of one expert's three matrices."""
        return 3 * self.hidden_size * self.intermediate_size * self.value_bytes


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


def seconds(mix: Mix, largest_B: np.ndarray, tokens: int, num_experts: int, machine: Machine) -> np.ndarray:
    """What computing, exchanging tokens, and moving weights take for batches of `tokens`, nothing overlapped [3, B].

    Args:
        largest_B: the assignments of the busiest rank.
    """
    passes, exchanges = (3, 4) if machine.training else (1, 2)
    feature_s = machine.hidden_size * machine.value_bytes / machine.link_bytes
    local = expert_bytes(mix, num_experts, machine)
    operations = 6 * machine.hidden_size * machine.intermediate_size / mix.slices
    compute_B = passes * np.maximum(largest_B * operations / machine.flops, local / machine.memory_bytes)
    if mix.ranks > 1:
        exchange_B = exchanges * largest_B * (1 - 1 / mix.ranks) * feature_s
    else:  # slices of all experts on every GPU: tokens are gathered, not sent to experts one by one
        exchange_B = np.full(len(largest_B), exchanges * tokens / mix.copies * (1 - 1 / mix.slices) * feature_s)
    others = (1 - 1 / mix.copies) * local / machine.link_bytes
    times = 1 + machine.training if machine.sharded else 2 * machine.training
    return np.stack([compute_B, exchange_B, np.full(len(largest_B), times * others)])


def expert_bytes(mix: Mix, num_experts: int, machine: Machine) -> float:
    """Of the experts' weights that a GPU computes with, in one layer."""
    return -(-num_experts // mix.ranks) * machine.expert_bytes / mix.slices


def held_bytes(mix: Mix, num_experts: int, machine: Machine) -> float:
    """Of the experts' weights that a GPU holds, in one layer, without gradients and what an optimiser keeps."""
    return expert_bytes(mix, num_experts, machine) / (mix.copies if machine.sharded else 1)
