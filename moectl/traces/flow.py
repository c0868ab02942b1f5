"""Which way tokens take through the layers, by their first choices.

Legend: T tokens, E experts, P distinct paths, D domains, N documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moectl.traces.information import beyond_chance, entropy, mutual_information
from moectl.traces.trace import NO_EXPERT, Point, RoutingTrace

MOST_FREQUENT = 10


@dataclass(frozen=True, slots=True)
class Flow:
    """From one point to the next.

    Attributes:
        source, target: the two points.
        count_EE: tokens by their first choice at the source (rows) and at the target (columns); those without either
            are left out.
        information: what the one tells of the other, in nats, as counted.
        null: the same after the tokens were shuffled at the target.
        value: of the entropy of the choice at the target, what the one at the source tells: 0 is what the shuffle
            gives, 1 is all (Vinh, Epps and Bailey, JMLR 11, 2010).
    """

    source: Point
    target: Point
    count_EE: np.ndarray
    information: float
    null: float
    value: float


@dataclass(frozen=True, slots=True)
class Paths:
    """First choices at all points together.

    Attributes:
        tokens: how many took one.
        distinct: how many different ones there are; a place without an expert makes a path different too.
        entropy: of their distribution, in nats; at most ln tokens.
        frequent: the most frequent paths and their shares of the tokens, at most `MOST_FREQUENT`.
        domains: those that have tokens.
        jsd_DD: Jensen-Shannon divergence between the paths of every two domains, equally weighted, as a part of ln 2: 0
            where they are the same, 1 where no path is shared.
        null_DD: the same after the documents were dealt to domains anew. Far above 0 where most paths are seen once.
    """

    tokens: int
    distinct: int
    entropy: float
    frequent: tuple[tuple[tuple[int, ...], float], ...]
    domains: tuple[str, ...]
    jsd_DD: np.ndarray
    null_DD: np.ndarray


def flow(trace: RoutingTrace, seed: int = 0) -> list[Flow]:
    """How tokens go from every point to the next."""
    generator = np.random.default_rng(seed)
    found = []
    for source, target in pairwise(trace.layers):
        both_T = (source.index_TK[:, 0] >= 0) & (target.index_TK[:, 0] >= 0)
        from_T, to_T = source.index_TK[both_T, 0].astype(np.int64), target.index_TK[both_T, 0]
        shape = source.point.num_experts, target.point.num_experts
        count_EE = _crossed(from_T, to_T, shape)
        information = mutual_information(count_EE)
        null = mutual_information(_crossed(from_T, generator.permutation(to_T), shape))
        value = beyond_chance(information, null, entropy(count_EE.sum(0)))
        found.append(Flow(source.point, target.point, count_EE, information, null, value))
    return found


def _crossed(from_T: np.ndarray, to_T: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(from_T * shape[1] + to_T, minlength=shape[0] * shape[1]).reshape(shape)


def paths(trace: RoutingTrace, seed: int = 0) -> Paths:
    """Which paths tokens take through all points, and how much those of two domains differ."""
    tokens = trace.tokens
    path_T = np.zeros(len(tokens), np.int64)
    for routed in trace.layers:
        here_T = routed.index_TK[:, 0].astype(np.int64) - NO_EXPERT
        path_T = np.unique(path_T * (routed.point.num_experts + 1) + here_T, return_inverse=True)[1]
    where_P, count_P = np.unique(path_T, return_index=True, return_counts=True)[1:]
    best = np.argsort(-count_P, kind="stable")[:MOST_FREQUENT]
    documents = np.unique(tokens.document_T)
    domain_N = tokens.domain_N.copy()
    present = np.unique(domain_N[documents])
    jsd_DD = _divergence(path_T, np.searchsorted(present, tokens.domain_T), len(count_P), len(present))
    domain_N[documents] = np.random.default_rng(seed).permutation(domain_N[documents])
    dealt_T = np.searchsorted(present, domain_N[tokens.document_T])
    return Paths(
        len(tokens),
        len(count_P),
        entropy(count_P),
        tuple(
            (tuple(int(routed.index_TK[where_P[path], 0]) for routed in trace.layers), int(count_P[path]) / len(tokens))
            for path in best
        ),
        tuple(tokens.domains[domain] for domain in present),
        jsd_DD,
        _divergence(path_T, dealt_T, len(count_P), len(present)),
    )


def _divergence(path_T: np.ndarray, domain_T: np.ndarray, paths: int, domains: int) -> np.ndarray:
    """Between every two domains, all of which have tokens [D, D]."""
    count_DP = np.bincount(domain_T * paths + path_T, minlength=domains * paths).reshape(domains, paths)
    share_DP = count_DP / count_DP.sum(1, keepdims=True)
    jsd_DD = np.zeros((domains, domains))
    for a in range(domains):
        for b in range(a):
            apart = entropy((share_DP[a] + share_DP[b]) / 2) - (entropy(share_DP[a]) + entropy(share_DP[b])) / 2
            jsd_DD[a, b] = jsd_DD[b, a] = max(0.0, apart / math.log(2))
    return jsd_DD
