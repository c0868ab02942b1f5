"""Placements that change from batch to batch, and what changing them costs.

FasterMoE (PPoPP 2022; laekov/fastmoe, `fmoe/fastermoe/shadow_policy.py`) copies the busiest experts to all GPUs for one
batch, after its routing is known. FlexMoE (arXiv 2304.03946) moves copies between batches. Lina (ATC 2023) guesses the
loads of the next layer from the experts that the tokens have just been to.

FlexMoE and Lina are written from memory of the papers. Legend: E experts, S slots, G GPUs, T tokens,
K choices, W ways, B slots of the busiest GPU, O slots of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moectl.routing.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, as FasterMoE models them.

    Attributes:
        compute_s: of an expert for one token, in all passes.
        exchange_s: of sending one token's features, all the times that they are sent.
        expert_s: of sending one expert's weights.
    """

    compute_s: float
    exchange_s: float
    expert_s: float

    @property
    def token_s(self) -> float:
        """Of a token at a GPU."""
        return self.compute_s + self.exchange_s


def cost_model(
    hidden_size: int, intermediate_size: int, value_bytes: float, tflops: float, gb_per_s: float, training: bool
) -> Cost:
    """The cost of gated experts: three matrices; in training three passes and four exchanges, else one and two."""
    values = 3 * hidden_size * intermediate_size
    passes, exchanges = (3, 4) if training else (1, 2)
    return Cost(
        passes * 2 * values / (tflops * 1e12),
        exchanges * hidden_size * value_bytes / (gb_per_s * 1e9),
        values * value_bytes / (gb_per_s * 1e9),
    )


def shadowed(load_E: np.ndarray, cost: Cost) -> np.ndarray:
    """Which experts FasterMoE copies to every GPU for a batch of those loads [E], bool.

    With the K busiest copied a layer takes lat(K) = token_s * (the next largest load) + K * expert_s; K grows while
    that falls.
    """
    order_E = np.argsort(-load_E, kind="stable")
    sorted_E = load_E[order_E]
    lat_K = cost.token_s * sorted_E + cost.expert_s * np.arange(len(load_E))
    rises = np.flatnonzero(np.diff(lat_K) >= 0)
    copied = int(rises[0]) if len(rises) else len(load_E) - 1
    chosen_E = np.zeros(len(load_E), bool)
    chosen_E[order_E[:copied]] = True
    return chosen_E


def received(before: Placement, after: Placement) -> int:
    """The most experts that a GPU needs in one placement and does not have in the other."""
    new_EG = (after.share_EG > 0) & ~(before.share_EG > 0)
    return int(new_EG.sum(0).max())


def flexed(placement: Placement, load_E: np.ndarray, cost: Cost, threshold: float, patience: float) -> Placement:
    """FlexMoE's next placement for loads [E] that were seen, by changes that pay for themselves in `patience` batches.

    While the largest load of a GPU is above `threshold` means, either the expert with the largest load per copy takes
    the slot of a copy that has the least (expand and shrink), or a slot of the busiest GPU changes places with one of
    another GPU (migrate): what saves more.
    """
    while True:
        each_S = (load_E / placement.copies_E)[placement.expert_S]
        load_G = np.bincount(placement.gpu_S, each_S, placement.gpus)
        if load_G.max() <= threshold * load_G.mean():
            return placement
        options = []
        for expert_S in _changes(placement, each_S, load_G):
            changed = replace(placement, expert_S=expert_S)
            after_S = (load_E / changed.copies_E)[expert_S]
            after_G = np.bincount(placement.gpu_S, after_S, placement.gpus)
            saved = cost.token_s * (load_G.max() - after_G.max()) * patience - cost.expert_s
            options.append((float(saved), changed))
        saved, changed = max(options, key=lambda option: option[0], default=(0.0, placement))
        if saved <= 0:
            return placement
        placement = changed


def _changes(placement: Placement, each_S: np.ndarray, load_G: np.ndarray) -> list[np.ndarray]:
    """What FlexMoE weighs: the experts in the slots after a change."""
    expert_S, gpu_S = placement.expert_S, placement.gpu_S
    hot = int(expert_S[each_S.argmax()])
    found = []
    spare_S = np.flatnonzero((placement.copies_E[expert_S] > 1) & (expert_S != hot))
    if len(spare_S):
        expanded_S = expert_S.copy()
        expanded_S[spare_S[each_S[spare_S].argmin()]] = hot
        found.append(expanded_S)
    busy_S, other_S = np.flatnonzero(gpu_S == load_G.argmax()), np.flatnonzero(gpu_S != load_G.argmax())
    if len(busy_S) and len(other_S):
        given_BO = each_S[busy_S][:, None] - each_S[other_S]
        larger_BO = np.maximum(load_G.max() - given_BO, load_G[gpu_S[other_S]] + given_BO)
        busy, other = np.unravel_index(larger_BO.argmin(), larger_BO.shape)
        swapped = [busy_S[busy], other_S[other]]
        migrated_S = expert_S.copy()
        migrated_S[swapped] = expert_S[swapped[::-1]]
        found.append(migrated_S)
    return found


def ways(first_LT: np.ndarray, num_experts: int) -> np.ndarray:
    """A number for the first choices of each token in the layers before, NO_EXPERT among them [T]."""
    way_T = np.zeros(first_LT.shape[1], np.int64)
    for first_T in first_LT:
        way_T = way_T * (num_experts + 1) + first_T + 1
    return way_T


def popularity(way_T: np.ndarray, index_TK: np.ndarray, num_ways: int, num_experts: int) -> np.ndarray:
    """How many of a token's choices go to each expert, by the way that it came [W, E], float32.

    Ways that no token came have the mean of all.
    """
    flat = (way_T[:, None] * num_experts + index_TK)[(index_TK >= 0) & (index_TK < num_experts)]
    count_WE = np.bincount(flat, minlength=num_ways * num_experts).reshape(num_ways, num_experts).astype(np.float32)
    tokens_W = np.bincount(way_T, minlength=num_ways)
    mean_E = count_WE.sum(0) / max(len(way_T), 1)
    count_WE /= np.maximum(tokens_W, 1)[:, None]
    count_WE[tokens_W == 0] = mean_E
    return count_WE


def foreseen(way_T: np.ndarray, popular_WE: np.ndarray) -> np.ndarray:
    """The loads to be expected of tokens that came those ways [E]."""
    tokens_W = np.bincount(way_T, minlength=len(popular_WE))
    used_W = np.flatnonzero(tokens_W)
    return np.asarray(tokens_W[used_W] @ popular_WE[used_W])
