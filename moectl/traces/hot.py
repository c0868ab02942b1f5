"""How few experts would do most of the work? Coverage of the busiest, of all in time, and of the scores.

Legend: T tokens, K experts per token, E experts, B blocks of documents, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.traces.statistics import RoutingStatistics, probabilities
from moectl.traces.trace import Point, RoutingTrace

STEPS = 64


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the busiest experts of one point cover.

    Attributes:
        share_E: of the assignments, the share that goes to the n + 1 busiest experts; n/E were fair.
        held_out_E: the same of experts that were chosen on one half of the documents, counted on the other: what a
            fixed set of resident experts would serve. None if one half has no assignments.
    """

    point: Point
    share_E: np.ndarray
    held_out_E: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Slots:
    """How soon every expert of every point has been used.

    Attributes:
        total: pairs of a point and an expert.
        tokens_S: numbers of tokens, from 1 to all, evenly spaced on a logarithmic scale.
        used_S: how many of the pairs had been used after so many tokens of the trace, in its order.
        fair_S: how many would have been, on average, with fair and independent choices.
        hottest: the largest load of a pair over the mean load of its point.
    """

    total: int
    tokens_S: np.ndarray
    used_S: np.ndarray
    fair_S: np.ndarray
    hottest: float


@dataclass(frozen=True, slots=True)
class Needed:
    """How many experts a token needs at one point for the probability asked for (arXiv 2403.07652, equation 4).

    Attributes:
        mean: over tokens; the expert that crosses the threshold counts.
        domains: the same of each domain that has tokens.
    """

    point: Point
    mean: float
    domains: dict[str, float]


def coverage(statistics: RoutingStatistics) -> list[Coverage]:
    """Which share of the assignments the busiest experts of every point get."""
    half_B = np.arange(len(statistics.domain_B)) % 2 == 0
    found = []
    for load in statistics.loads:
        count_E = load.count_E
        halves = load.count_BE[half_B].sum(0), load.count_BE[~half_B].sum(0)
        held_out_E = None
        if halves[0].any() and halves[1].any():
            held_out_E = (_cumulated(halves[1], halves[0]) + _cumulated(halves[0], halves[1])) / count_E.sum()
        found.append(Coverage(load.point, _cumulated(count_E, count_E) / max(count_E.sum(), 1), held_out_E))
    return found


def _cumulated(count_E: np.ndarray, order_E: np.ndarray) -> np.ndarray:
    """Counts added up in the order of other counts, the largest first."""
    return np.cumsum(count_E[np.argsort(-order_E, kind="stable")])


def slots(trace: RoutingTrace) -> Slots:
    """How soon every expert of every point has been used, in the order of the trace's tokens."""
    tokens = len(trace)
    tokens_S = np.unique(np.geomspace(1, max(tokens, 1), STEPS).round().astype(np.int64))
    used_S, fair_S = np.zeros(len(tokens_S), np.int64), np.zeros(len(tokens_S))
    hottest = 0.0
    for routed in trace.layers:
        token_TK = np.repeat(np.arange(tokens), routed.point.top_k)
        experts = routed.point.num_experts
        count_E = np.bincount(routed.index_TK[routed.index_TK >= 0], minlength=experts)
        hottest = max(hottest, float(count_E.max()) * experts / max(int(count_E.sum()), 1))
        first_E = np.full(experts + 1, tokens)  # the place behind the last expert is for NO_EXPERT
        np.minimum.at(first_E, routed.index_TK.ravel().astype(np.intp), token_TK)
        used_S += np.searchsorted(np.sort(first_E[:-1]), tokens_S - 1, side="right") if tokens else 0
        fair_S += experts * (1 - (1 - routed.point.top_k / experts) ** tokens_S) if tokens else 0
    return Slots(sum(routed.point.num_experts for routed in trace.layers), tokens_S, used_S, fair_S, hottest)


def needed(trace: RoutingTrace, mass: float = 0.9) -> list[Needed]:
    """How many experts hold `mass` of a token's probability, at the points whose scores were recorded.

    Raises:
        InputError: a score is NaN or infinite.
    """
    domain_T = trace.tokens.domain_T
    found = []
    for routed in trace.layers:
        if routed.score_TE is None or len(trace) == 0:
            continue
        p_TE = -np.sort(-probabilities(routed.point, routed.score_TE), axis=1)
        below_TE = np.cumsum(p_TE, axis=1) < mass
        number_T = np.minimum(below_TE.sum(1) + 1, routed.point.num_experts)
        means = {
            name: float(number_T[domain_T == domain].mean())
            for domain, name in enumerate(trace.tokens.domains)
            if (domain_T == domain).any()
        }
        found.append(Needed(routed.point, float(number_T.mean()), means))
    return found
