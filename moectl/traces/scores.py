"""What the routers' scores say: the balancing loss of every layer, their certainty and their size.

Legend: E experts, M bins of margins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moectl.traces.statistics import MARGIN_EDGES, Load, RoutingStatistics
from moectl.traces.trace import Point


@dataclass(frozen=True, slots=True)
class ScoreMetrics:
    """The router of one point.

    Attributes:
        aux: E * sum over experts of f_e P_e, over this point alone: f_e is the share of tokens that use the expert and
            P_e its mean probability. As in Hugging Face's models the f_e sum to k, so that perfect balance gives k
            (Switch Transformers, arXiv 2101.03961, equation 4, has k = 1) and collapse onto k experts gives E.
        entropy: of a token's distribution over experts, mean, in nats.
        entropy_share: that as a part of ln E.
        z: mean square of logsumexp (ST-MoE, arXiv 2202.08906, equation 5); None where the scores are no logits.
        margin_median: of the difference between the last chosen and the first unchosen probability, as exact as the
            bins of the histogram; None where every expert is chosen.
    """

    point: Point
    aux: float
    entropy: float
    entropy_share: float
    z: float | None
    margin_median: float | None


def score_metrics(statistics: RoutingStatistics) -> list[ScoreMetrics]:
    """The routers of the points whose scores were recorded, for at least one token."""
    found = []
    for load in statistics.loads:
        scored = load.scored
        if scored is None or scored.tokens == 0:
            continue
        experts = load.point.num_experts
        certainty = scored.entropy / scored.tokens
        found.append(
            ScoreMetrics(
                load.point,
                _aux([load], statistics.tokens),
                certainty,
                certainty / math.log(experts) if experts > 1 else 0.0,
                None if math.isnan(scored.z) else scored.z / scored.tokens,
                _median(scored.margin_M),
            )
        )
    return found


def pooled_aux(statistics: RoutingStatistics) -> float | None:
    """The balancing loss as transformers' models report it, over all points together; None if their experts differ.

    It is blind: each layer may send everything to a few experts, and as long as they are others in each, the counts
    add up to perfect balance. It is here to be shown beside the values of the layers.
    """
    loads = [load for load in statistics.loads if load.scored is not None and load.scored.tokens]
    if len({load.point.num_experts for load in loads}) != 1:
        return None
    return _aux(loads, statistics.tokens)


def _aux(loads: Sequence[Load], tokens: int) -> float:
    f_E = np.mean([load.count_E / tokens for load in loads], axis=0)
    p_E = np.mean([load.scored.probability_E / load.scored.tokens for load in loads if load.scored], axis=0)
    return float(len(f_E) * (f_E @ p_E))


def _median(margin_M: np.ndarray) -> float | None:
    """Within the bin that holds the middle, in proportion."""
    below_M = np.cumsum(margin_M)
    if below_M[-1] == 0:
        return None
    return float(np.interp(below_M[-1] / 2, np.concatenate([[0], below_M]), MARGIN_EDGES))
