"""Which experts are used together by a token (OLMoE, arXiv 2409.02060, section 5). Legend: T tokens, E experts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from moectl.traces.trace import Point, Routed, RoutingTrace

PAIRS = 10


@dataclass(frozen=True, slots=True)
class Coactivation:
    """Which experts go together at one point.

    Attributes:
        together_EE: of the tokens that use i, the share that use j too; its diagonal is 0, and the row of an expert
            without tokens is NaN.
        chance: what even and independent choices give.
        strongest: pairs (i, j) with i < j and their tokens as a share of those of the more frequent of the two (the
            lesser of the two shares, so that a rare expert makes no pair), the largest first, at most `PAIRS`.
    """

    point: Point
    together_EE: np.ndarray
    chance: float
    strongest: tuple[tuple[int, int, float], ...]


def coactivation(trace: RoutingTrace, adjacent: bool = False) -> list[Coactivation]:
    """Which experts go together, at every point.

    Args:
        trace: its tokens' experts are distinct.
        adjacent: count only pairs of neighbouring ranks, as the released code of OLMoE does and its paper does not.
    """
    return [_of_point(routed, adjacent) for routed in trace.layers]


def _of_point(routed: Routed, adjacent: bool) -> Coactivation:
    experts, top_k = routed.point.num_experts, routed.point.top_k
    index_TK = routed.index_TK.astype(np.int64)
    count_F = np.zeros(experts * experts, np.int64)
    ranks = pairwise(range(top_k)) if adjacent else combinations(range(top_k), 2)
    pairs = 0
    for a, b in ranks:
        pairs += 1
        both_T = (index_TK[:, a] >= 0) & (index_TK[:, b] >= 0)
        count_F += np.bincount(index_TK[both_T, a] * experts + index_TK[both_T, b], minlength=experts * experts)
    count_EE = count_F.reshape(experts, experts)
    count_EE = count_EE + count_EE.T
    uses_E = np.bincount(index_TK[index_TK >= 0], minlength=experts)
    together_EE = np.full((experts, experts), np.nan)
    np.divide(count_EE, uses_E[:, None], out=together_EE, where=uses_E[:, None] > 0)
    chance = 2 * pairs / (top_k * (experts - 1)) if experts > 1 else 0.0
    return Coactivation(routed.point, together_EE, chance, _strongest(count_EE, uses_E))


def _strongest(count_EE: np.ndarray, uses_E: np.ndarray) -> tuple[tuple[int, int, float], ...]:
    lesser_EE = np.triu(count_EE / np.maximum(uses_E[:, None], uses_E[None]).clip(1), 1)
    best = np.argsort(-lesser_EE, axis=None, kind="stable")[:PAIRS]
    rows, columns = np.unravel_index(best, lesser_EE.shape)
    return tuple(
        (int(i), int(j), float(lesser_EE[i, j])) for i, j in zip(rows, columns, strict=True) if lesser_EE[i, j] > 0
    )
