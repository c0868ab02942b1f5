"""Placements from loads: as the numbers stand, repacked, and with copies of the busiest experts (EPLB).

EPLB (github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437, section 3.4) gives groups of experts to nodes, copies
the experts with the largest load per copy inside each node, and gives the copies to GPUs; each packing is greedy, the
heaviest first to the lightest pack that has room. None of it is optimal. Legend: E experts, S slots, I items.
"""

from __future__ import annotations

import heapq

import numpy as np

from moectl.routing.placement.placement import Placement
from moectl.routing.whatif.asked import homes


def contiguous(num_experts: int, gpus: int) -> Placement:
    """Neighbours together, as `homes` has them."""
    return Placement(np.arange(num_experts), homes(num_experts, gpus), num_experts, gpus)


def repacked(load_E: np.ndarray, gpus: int) -> Placement:
    """Each expert once, as many on every GPU as `contiguous` has, packed by load."""
    return eplb(load_E, len(load_E), gpus)


def eplb(load_E: np.ndarray, slots: int, gpus: int, groups: int = 1, nodes: int = 1) -> Placement:
    """The experts and as many copies as fill `slots`, spread by load [E] over GPUs, groups of experts on one node.

    Groups and nodes are left aside where they do not divide, as EPLB does it.
    """
    experts = len(load_E)
    if groups % nodes or experts % groups or slots % nodes or gpus % nodes:
        groups = nodes = 1
    load_E = np.asarray(load_E, np.float64)
    of_group = np.arange(experts).reshape(groups, -1)
    placed = []
    for groups_of_node in _packed(load_E[of_group].sum(1), nodes):
        own_E = of_group[groups_of_node].reshape(-1)
        copied_S = _replicated(load_E[own_E], slots // nodes)
        each_S = (load_E[own_E] / np.bincount(copied_S))[copied_S]
        placed += [own_E[copied_S[np.array(slots_of_gpu, int)]] for slots_of_gpu in _packed(each_S, gpus // nodes)]
    gpu_S = np.repeat(np.arange(gpus), [len(each) for each in placed])
    return Placement(np.concatenate(placed), gpu_S, experts, gpus)


def _packed(weight_I: np.ndarray, packs: int) -> list[list[int]]:
    """The items of each pack, in the order in which they went in; sizes equal but for one."""
    room = np.bincount(np.arange(len(weight_I)) % packs, minlength=packs).tolist()
    if max(room, default=0) == 1:  # EPLB leaves them where they are too
        return [[item] if item < len(weight_I) else [] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    open_packs = [(0.0, pack) for pack in range(packs) if room[pack]]
    weights = weight_I.tolist()
    for item in np.argsort(-weight_I, kind="stable").tolist():
        weight, pack = open_packs[0]
        found[pack].append(item)
        if len(found[pack]) < room[pack]:
            heapq.heapreplace(open_packs, (weight + weights[item], pack))
        else:
            heapq.heappop(open_packs)
    return found


def _replicated(load_E: np.ndarray, slots: int) -> np.ndarray:
    """Every expert once, then copy after copy of the one with the largest load per copy [S]."""
    loads = load_E.tolist()
    copies = [1] * len(loads)
    found = list(range(len(loads)))
    by_load = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(by_load)
    for _ in range(slots - len(loads)):
        _, expert = by_load[0]
        found.append(expert)
        copies[expert] += 1
        heapq.heapreplace(by_load, (-loads[expert] / copies[expert], expert))
    return np.array(found)
