"""Placements that change with the loads: for one batch (FasterMoE), or from one batch to the next (FlexMoE).

FasterMoE (PPoPP 2022; laekov/fastmoe, `fmoe/fastermoe/shadow_policy.py`) copies the busiest experts to all GPUs for one
batch, after its routing is known. FlexMoE (arXiv 2304.03946; algorithms 1 and 2, read in what its own authors' group
measures against, PKU-DAIR/Hetu-Galvatron, `galvatron/core/runtime/moe/prefetch/solver.py`, and as arXiv 2504.19925
describes it) moves a copy at a time from the least to the most popular expert.
Legend: E experts, S slots, G GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moectl.routing.placement.hardware import Cost
from moectl.routing.placement.placement import Placement, gpu_loads


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

    While the largest load of a GPU is above `threshold` means, the expert with the largest load per copy gets one more
    (expand), in place of a copy of the one with the least of those that have several (shrink). The paper's third move,
    migrate, brings copies of an expert nearer to each other; here all GPUs are equally far apart.
    """
    while True:
        load_G = gpu_loads(placement, load_E)
        if load_G.max() <= threshold * load_G.mean():
            return placement
        changed = _expanded(placement, load_E / placement.copies_E, load_G)
        saved = load_G.max() - gpu_loads(changed, load_E).max()
        if saved <= 0 or cost.token_s * saved * patience <= cost.expert_s:
            return placement
        placement = changed


def _expanded(placement: Placement, each_E: np.ndarray, load_G: np.ndarray) -> Placement:
    """With one more copy of the most popular expert, on the least loaded GPU that has one to spare; or as it is."""
    expert_S, hot = placement.expert_S.copy(), int(each_E.argmax())
    spare_E = (placement.copies_E > 1) & (np.arange(placement.num_experts) != hot)
    if not spare_E.any():
        return placement
    copies = np.flatnonzero(expert_S == np.where(spare_E, each_E, np.inf).argmin())
    expert_S[copies[load_G[placement.gpu_S[copies]].argmin()]] = hot
    return replace(placement, expert_S=expert_S)
