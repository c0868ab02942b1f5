"""The conventions of those who drop: whose rounding, whose queue, and who shares the places.

Legend: T tokens, K choices, E experts, G groups of tokens that share places, B buckets (experts or devices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moectl.errors import InputError, UsageError
from moectl.routers.capacity import Convention
from moectl.routers.capacity import capacity as places_of
from moectl.routing.whatif.asked import chunks, computing, homes, require_numbers, weights
from moectl.routing.whatif.queues import Groups, by_rank, by_weight, places
from moectl.text import shown
from moectl.traces.trace import NO_EXPERT, Routed

CONVENTIONS = {
    "switch": "ceil(cf k T / E) places, first choices before second ones, earlier tokens first (arXiv 2101.03961)",
    "gshard": "as switch, and a second choice is sent with the probability min(1, 2 g2) (arXiv 2006.16668)",
    "tutel": "k int(cf ceil(T / E)) places, first choices before second ones (microsoft/Tutel)",
    "megatron": "ceil(cf k T / E) places, for the highest weights of whatever rank (Megatron-LM's policy `probs`)",
    "v-moe": "as switch, and tokens queue by their highest probability (batch prioritised, arXiv 2106.05974)",
    "hf-switch": "a number of places per expert and sequence, whatever its length (transformers' expert_capacity)",
    "deepseek-v2": "ceil(cf k T / D) places on each of D devices, for the highest weights (arXiv 2405.04434, 2.2.4)",
}
_ROUNDING: Mapping[str, Convention] = {"tutel": "tutel", "megatron": "megatron"}
WEIGHED = ("gshard", "megatron", "deepseek-v2")
"""Conventions that need the combine weights; v-moe needs them where there are no scores."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        convention: whose rounding and queue: switch, gshard, tutel, megatron, v-moe, hf-switch or deepseek-v2.
        factor: places per expert, as a multiple of what perfect balance needs.
        expert_capacity: places per expert and sequence, in place of a factor; of hf-switch alone.
        group: whose tokens share the places: `batch`, `rank` (its part of a batch) or `sequence` (a document).
        batch_tokens: tokens of a batch.
        gpus: ranks that a batch is split over; devices of deepseek-v2.
        seed: of gshard's second choices.
    """

    convention: str = "switch"
    factor: float = 1.25
    expert_capacity: int = 64
    group: str = "batch"
    batch_tokens: int = 4096
    gpus: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("convention", self.convention, tuple(CONVENTIONS)),
            ("group", self.group, ("batch", "rank", "sequence")),
        ):
            if value not in known:
                raise UsageError(f"There is no {name} {shown(value)!r}.", "", f"Give one of {', '.join(known)}.")
        require_numbers(self)

    @property
    def asked(self) -> float:
        """The capacity that was asked for: the factor, or the places."""
        return self.expert_capacity if self.convention == "hf-switch" else self.factor

    @property
    def group_tokens(self) -> int:
        """Tokens of a group; 0 for a document."""
        if self.convention == "hf-switch" or self.group == "sequence":
            return 0
        return self.batch_tokens if self.group == "batch" else -(-self.batch_tokens // self.gpus)


@dataclass(frozen=True, slots=True)
class Queued:
    """One layer, in queues.

    Attributes:
        bucket_TK: whose queue each assignment stands in; NO_EXPERT where it is not sent.
        place_TK: its place there.
        count_GB: how long the queues are.
        size_B: experts of each bucket.
        top_k: choices of a token.
    """

    bucket_TK: np.ndarray
    place_TK: np.ndarray
    count_GB: np.ndarray
    size_B: np.ndarray
    top_k: int


def queued(routed: Routed, of: Groups, options: Options) -> Queued:
    """One layer's assignments in the queues of a convention.

    Raises:
        InputError: the convention needs weights that the trace has not, or cannot be for so many choices.
    """
    index_TK, experts = computing(routed)
    top_k = routed.point.top_k
    bucket_TK, size_B = index_TK, np.ones(experts, np.int64)
    weight_TK = weights(routed) if options.convention in WEIGHED else None
    if options.convention == "gshard" and top_k > 1 and weight_TK is not None:
        if top_k > 2:
            raise InputError(
                f"{routed.point.name} sends a token to {top_k} experts.",
                "GShard's rule is for a first and a second choice.",
                "Give another convention, as convention=switch.",
            )
        second_T = weight_TK[:, 1] / weight_TK.sum(1).clip(1e-30)
        drawn_T = np.random.default_rng([options.seed, routed.point.layer]).random(len(second_T))
        bucket_TK = index_TK.copy()
        bucket_TK[2 * second_T <= drawn_T, 1] = NO_EXPERT
    if options.convention == "deepseek-v2":
        devices = min(options.gpus, experts)
        gpu_E = homes(experts, devices)
        bucket_TK, size_B = np.where(index_TK >= 0, gpu_E[index_TK], NO_EXPERT), np.bincount(gpu_E, minlength=devices)
    if options.convention in ("megatron", "deepseek-v2") and weight_TK is not None:
        order_S = by_weight(of, weight_TK)
    else:
        order_S = by_rank(of, top_k, _priority(routed) if options.convention == "v-moe" else None)
    place_TK, count_GB = places(bucket_TK, order_S, of, len(size_B))
    return Queued(bucket_TK, place_TK, count_GB, size_B, top_k)


def _priority(routed: Routed) -> np.ndarray:
    if routed.score_TE is None:
        return np.asarray(weights(routed).max(1))
    return np.concatenate([p_TE.max(1) for _, p_TE in chunks(routed)])


def room(queue: Queued, of: Groups, options: Options, at: float) -> np.ndarray:
    """Places of each queue at a factor, or at that many places [G]."""
    if options.convention == "hf-switch":
        return np.full(len(of.size_G), int(at))
    size_X, where_G = np.unique(of.size_G, return_inverse=True)
    convention = _ROUNDING.get(options.convention, "switch")
    rooms = [places_of(int(size), len(queue.size_B), queue.top_k, at, convention) for size in size_X]
    return np.array(rooms)[where_G]


def kept(queue: Queued, of: Groups, options: Options) -> np.ndarray:
    """Which assignments find a place, bool [T, K]."""
    room_G = room(queue, of, options, options.asked)
    return (queue.bucket_TK >= 0) & (queue.place_TK < room_G[of.group_T][:, None])
