"""Is the load even? Numbers over the counts of each point.

Where nothing was counted (a domain without tokens) the shares are 0 and the rest is what perfect balance gives.
Legend: E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moectl.traces.information import entropy, log_choose
from moectl.traces.statistics import Load, RoutingStatistics, require_weights
from moectl.traces.trace import Point


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly one point loads its experts, all of them: those that compute nothing count too.

    Attributes:
        tokens: how many were counted.
        share_E: of the assignments, sums to 1.
        cv: standard deviation of the loads over their mean.
        gini: 0 where all loads are equal, 1 - 1/E where one expert has all.
        entropy: of the shares, as a part of ln E: 1 where all are equal, 0 where one expert has all.
        effective: experts, if they were equally loaded, of the same entropy: its exponential.
        max_vio: by how much the largest load exceeds the mean, in means (arXiv 2408.15664).
        max_vio_batch: the mean of that over batches; None where not recorded, and for a single domain.
        busiest: the expert with the largest load.
        busiest_share: of the tokens, how many use it.
        unseen: experts without a token.
        unseen_chance: at most how likely at least so many would be unseen if every token chose its experts by a fair
            lot, C(E, u) * (C(E - u, k) / C(E, k))^T: the mean number of sets of u unseen ones. 1 where all were seen.
        dropped: of the places of all tokens, how many had no expert.
        weight_share_E: of the combine weights, sums to 1; None where not recorded.
    """

    point: Point
    tokens: int
    share_E: np.ndarray
    cv: float
    gini: float
    entropy: float
    effective: float
    max_vio: float
    max_vio_batch: float | None
    busiest: int
    busiest_share: float
    unseen: tuple[int, ...]
    unseen_chance: float
    dropped: float
    weight_share_E: np.ndarray | None


def balance(statistics: RoutingStatistics, domain: str | None = None) -> list[Balance]:
    """How even the load is at every point, over all tokens or those of one domain.

    Raises:
        InputError: a combine weight is NaN or infinite.
    """
    in_B = np.ones(len(statistics.domain_B), bool)
    if domain is not None:
        in_B = statistics.domain_B == statistics.domains.index(domain)
    batches = statistics.max_vio_batch if domain is None else ()
    tokens = int(statistics.tokens_B[in_B].sum())
    return [
        _of_point(load, in_B, tokens, batches[number] if batches else None)
        for number, load in enumerate(statistics.loads)
    ]


def _of_point(load: Load, in_B: np.ndarray, tokens: int, max_vio_batch: float | None) -> Balance:
    point, count_E = load.point, load.count_BE[in_B].sum(0)
    experts, assigned = point.num_experts, int(count_E.sum())
    even_E = count_E / assigned if assigned else np.full(experts, 1 / experts)
    heat = entropy(even_E)
    ranks_E = 2 * np.arange(1, experts + 1) - experts - 1
    busiest = int(count_E.argmax())
    unseen = np.flatnonzero(count_E == 0)
    weight_share_E = None
    if load.weight_BE is not None:
        weight_E = load.weight_BE[in_B].sum(0)
        require_weights(point, weight_E)
        weight_share_E = weight_E / weight_E.sum() if weight_E.sum() else weight_E
    return Balance(
        point,
        tokens,
        share_E=count_E / max(assigned, 1),
        cv=float(even_E.std() * experts),
        gini=float(ranks_E @ np.sort(even_E)) / experts,
        entropy=heat / math.log(experts) if experts > 1 else 1.0,
        effective=math.exp(heat),
        max_vio=float(even_E.max()) * experts - 1,
        max_vio_batch=max_vio_batch,
        busiest=busiest,
        busiest_share=int(count_E[busiest]) / max(tokens, 1),
        unseen=tuple(int(expert) for expert in unseen),
        unseen_chance=_unseen_chance(experts, point.top_k, len(unseen), assigned),
        dropped=1 - assigned / (tokens * point.top_k) if tokens else 0.0,
        weight_share_E=weight_share_E,
    )


def _unseen_chance(experts: int, top_k: int, unseen: int, assigned: int) -> float:
    if unseen == experts:
        return 1.0
    if experts - unseen < top_k:  # possible where choices were dropped: then each assignment is a draw of its own
        top_k = 1
    missed = assigned / top_k * (log_choose(experts - unseen, top_k) - log_choose(experts, top_k))
    return math.exp(min(0.0, log_choose(experts, unseen) + missed))
