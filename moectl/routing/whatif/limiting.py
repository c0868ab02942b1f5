"""Tokens routed again under every limit of nodes at once.

A node's score is the sum of its two highest (V3, arXiv 2412.19437, 2.1.2), or its highest (V2, arXiv 2405.04434,
2.2.2); the best nodes are kept, and the token chooses again among their experts.
Legend: T tokens, K choices, E experts, N nodes, M limits, p probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.compiled import compiled


@dataclass(frozen=True, slots=True)
class Limited:
    """Sums over tokens, for every limit 1..N.

    Attributes:
        tokens: how many.
        changed_M: choices of the top-k that are no longer made.
        mass_M: probability of the experts that are chosen.
        nodes_M: nodes that the choices are on.
        agreed: choices of the trace that the top-k of the scores has too.
        recorded: choices of the trace.
    """

    tokens: int
    changed_M: np.ndarray
    mass_M: np.ndarray
    nodes_M: np.ndarray
    agreed: int
    recorded: int

    def __add__(self, other: Limited) -> Limited:
        return Limited(*(getattr(self, name) + getattr(other, name) for name in Limited.__slots__))


def limited(p_TE: np.ndarray, index_TK: np.ndarray, node_E: np.ndarray, best_of: int) -> Limited:
    """Route again under every limit. Of equal scores the lower number comes first."""
    nodes = int(node_E.max()) + 1
    sums_M3, agreed = np.zeros((nodes, 3)), np.zeros(1, np.int64)
    first_N = np.searchsorted(node_E, np.arange(nodes + 1))
    _limited(p_TE, index_TK, node_E.astype(np.int64), first_N, best_of, sums_M3, agreed)
    changed_M, mass_M, nodes_M = sums_M3.T
    return Limited(len(p_TE), changed_M, mass_M, nodes_M, int(agreed[0]), int((index_TK >= 0).sum()))


@compiled
def _limited(
    p_TE: np.ndarray,
    index_TK: np.ndarray,
    node_E: np.ndarray,
    first_N: np.ndarray,
    best_of: int,
    sums_M3: np.ndarray,
    agreed: np.ndarray,
) -> None:
    T, E = p_TE.shape
    N, K = len(sums_M3), index_TK.shape[1]
    score_N, order_N = np.empty(N), np.empty(N, np.int64)
    best_MK, held = np.empty((N, K), np.int64), np.zeros(N, np.int64)
    final_E, met_N = np.full(E, -1), np.full(N, -1)
    for token in range(T):
        for node in range(N):
            top, second = 0.0, 0.0
            for expert in range(first_N[node], first_N[node + 1]):
                p = p_TE[token, expert]
                if p > top:
                    top, second = p, top
                elif p > second:
                    second = p
            score_N[node] = top + second if best_of == 2 else top
            at = node
            while at > 0 and score_N[order_N[at - 1]] < score_N[node]:
                order_N[at] = order_N[at - 1]
                at -= 1
            order_N[at] = node
        count = 0
        for limit in range(N):
            for k in range(count):
                best_MK[limit, k] = best_MK[limit - 1, k]
            for expert in range(first_N[order_N[limit]], first_N[order_N[limit] + 1]):
                p, at = p_TE[token, expert], count
                while at > 0:
                    other = best_MK[limit, at - 1]
                    if p_TE[token, other] > p or (p_TE[token, other] == p and other < expert):
                        break
                    if at < K:
                        best_MK[limit, at] = other
                    at -= 1
                if at < K:
                    best_MK[limit, at] = expert
                    count = min(count + 1, K)
            held[limit] = count
        for k in range(held[N - 1]):
            final_E[best_MK[N - 1, k]] = token
        for k in range(K):
            agreed[0] += index_TK[token, k] >= 0 and final_E[index_TK[token, k]] == token
        for limit in range(N):
            kept = 0
            for k in range(held[limit]):
                expert = best_MK[limit, k]
                kept += final_E[expert] == token
                sums_M3[limit, 1] += p_TE[token, expert]
                if met_N[node_E[expert]] != token * N + limit:
                    met_N[node_E[expert]] = token * N + limit
                    sums_M3[limit, 2] += 1
            sums_M3[limit, 0] += held[N - 1] - kept
