"""Lina's placements (ATC 2023, arXiv 2210.17223, section 5): loads foretold from the way that tokens have come.

A way is what the tokens chose in the layers before. On other tokens it is counted how popular the experts of a layer
are among those that came the same way; of each way only the top-k are kept. The paper has as many GPUs as experts,
and a first choice alone. Here the popularities that are kept are scaled to what all GPUs compute, since with many
experts to a GPU some would else stay without any; and a way is one of first choices.
Legend: E experts, T tokens, K choices, P pairs of a way and one of its popular experts, S slots, W ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.routing.placement.placement import Placement

_ANY = -1
"""The way of tokens that came as no other did: all ways together."""


@dataclass(frozen=True, slots=True)
class Popular:
    """The popular experts of each way.

    Attributes:
        way_P: rising.
        expert_P: popular with those that came that way.
        share_P: of their choices, how many go to it.
    """

    way_P: np.ndarray
    expert_P: np.ndarray
    share_P: np.ndarray


def ways(first_LT: np.ndarray, num_experts: int) -> np.ndarray:
    """A number for the first choices of each token in the layers before, NO_EXPERT among them [T], int64."""
    way_T = np.zeros(first_LT.shape[1], np.int64)
    for first_T in first_LT:
        way_T = way_T * (num_experts + 1) + first_T + 1
    return way_T


def popularity(way_T: np.ndarray, index_TK: np.ndarray, num_experts: int, top_k: int) -> Popular:
    """The `top_k` experts that are most popular with the tokens of each way, and with all; of equals the lower."""
    way_X, index_XK = np.concatenate([np.full_like(way_T, _ANY), way_T]), np.concatenate([index_TK, index_TK])
    there_XK = (index_XK >= 0) & (index_XK < num_experts)
    pair_P, count_P = np.unique((way_X[:, None] * num_experts + index_XK)[there_XK], return_counts=True)
    way_P, expert_P = np.divmod(pair_P, num_experts)
    order_P = np.lexsort((expert_P, -count_P, way_P))
    way_P, expert_P, count_P = way_P[order_P], expert_P[order_P], count_P[order_P]
    first_W, number_P = np.unique(way_P, return_index=True, return_inverse=True)[1:]
    kept_P = np.arange(len(way_P)) - first_W[number_P] < top_k
    share_P = count_P / np.bincount(number_P, count_P)[number_P] if len(number_P) else np.zeros(0)
    return Popular(way_P[kept_P], expert_P[kept_P], share_P[kept_P])


def foreseen(way_T: np.ndarray, popular: Popular, num_experts: int) -> np.ndarray:
    """How popular each expert is to be expected with tokens that came those ways: the sum over them [E]."""
    way_W, tokens_W = np.unique(np.where(np.isin(way_T, popular.way_P), way_T, _ANY), return_counts=True)
    at_P = np.searchsorted(way_W, popular.way_P).clip(max=len(way_W) - 1)
    tokens_P = np.where(way_W[at_P] == popular.way_P, tokens_W[at_P], 0)
    return np.bincount(popular.expert_P, popular.share_P * tokens_P, num_experts)


def proportional(popular_E: np.ndarray, gpus: int) -> Placement:
    """GPUs in proportion to popularity, n = GPUs * share (equation 1), packed by first-fit decreasing.

    An expert has the nearest number of copies to n, one at least; how n is rounded the paper leaves open. Experts that
    no token is foretold to come to are dealt in turn to GPUs that are left, or to all; the paper draws them at random.
    """
    need_E = gpus * popular_E / max(float(popular_E.sum()), 1e-300)
    copies_E = np.where(need_E > 0, np.maximum(1, np.floor(need_E + 0.5 + 1e-9)), 0).astype(np.int64)
    expert_S = np.repeat(np.arange(len(need_E)), copies_E)
    each_S = (need_E / np.maximum(copies_E, 1))[expert_S]
    falling_S = np.argsort(-each_S, kind="stable")
    expert_S, each_S = expert_S[falling_S], each_S[falling_S]
    level_G, gpu_S = np.zeros(gpus), np.empty(len(expert_S), np.int64)
    for slot, each in enumerate(each_S):
        roomy = np.flatnonzero((level_G == 0) | (level_G + each <= 1 + 1e-9))
        gpu_S[slot] = roomy[0] if len(roomy) else level_G.argmin()
        level_G[gpu_S[slot]] += each
    unforeseen, left = np.flatnonzero(copies_E == 0), np.flatnonzero(level_G == 0)
    dealt_S = (left if len(left) else np.arange(gpus))[np.arange(len(unforeseen)) % (len(left) or gpus)]
    expert_S, gpu_S = np.append(expert_S, unforeseen), np.append(gpu_S, dealt_S)
    order_S = np.argsort(gpu_S, kind="stable")
    return Placement(expert_S[order_S], gpu_S[order_S], len(popular_E), gpus)
