"""Guesses of a token's experts at the next layer from what it, and its document, did before: the place of what came.

A guess puts all experts of a layer in an order; whoever fetches the first m of them has those whose place is below m.
Legend: T tokens, K experts per token, E experts, F experts of the next layer, L layers, D domains, M stored matrices.
"""

from __future__ import annotations

import numpy as np

from moectl.compiled import compiled


def order(count_E: np.ndarray) -> np.ndarray:
    """The place of each expert, by falling counts [E], int64."""
    place_E = np.empty(len(count_E), np.int64)
    place_E[np.argsort(-count_E, kind="stable")] = np.arange(len(count_E))
    return place_E


def popular(next_TK: np.ndarray, count_F: np.ndarray, domain_T: np.ndarray, domains: int) -> np.ndarray:
    """How often the expert at each place of the order by `count_F` came [D, F], int64."""
    place_TK = order(count_F)[next_TK]
    domain_TK = np.broadcast_to(domain_T[:, None], next_TK.shape)
    there_TK = next_TK >= 0
    at = domain_TK[there_TK] * len(count_F) + place_TK[there_TK]
    return np.bincount(at, minlength=domains * len(count_F)).reshape(domains, -1)


def markov(
    now_TK: np.ndarray,
    next_TK: np.ndarray,
    fit_T: np.ndarray,
    count_F: np.ndarray,
    experts: int,
    domain_T: np.ndarray,
    domains: int,
) -> np.ndarray:
    """The same, of the order by the mean of P(f | e) over a token's experts e, counted on some tokens, for the others.

    Args:
        now_TK, next_TK: the experts of each token at one layer and at the next, negative where there is none.
        fit_T: which tokens are counted on.
        count_F: how often those took each expert of the next layer: for an e that they never took, and to break ties.
        experts: E.
        domain_T, domains: what the places are counted under.
    """
    share_EF = np.zeros((experts, len(count_F)))
    _pairs(now_TK, next_TK, fit_T, share_EF)
    seen_E = np.bincount(now_TK[fit_T][now_TK[fit_T] >= 0], minlength=experts)
    share_EF[seen_E == 0] = count_F / max(int(fit_T.sum()), 1)
    share_EF /= np.maximum(seen_E, 1)[:, None]
    place_DF = np.zeros((domains, len(count_F)), np.int64)
    _chained(now_TK, next_TK, ~fit_T, share_EF, order(count_F), domain_T, place_DF)
    return place_DF


@compiled
def _pairs(now_TK: np.ndarray, next_TK: np.ndarray, fit_T: np.ndarray, pairs_EF: np.ndarray) -> None:
    for token in range(len(now_TK)):
        if fit_T[token]:
            for e in now_TK[token]:
                for f in next_TK[token]:
                    if e >= 0 and f >= 0:
                        pairs_EF[e, f] += 1


@compiled
def _chained(
    now_TK: np.ndarray,
    next_TK: np.ndarray,
    judged_T: np.ndarray,
    share_EF: np.ndarray,
    order_F: np.ndarray,
    domain_T: np.ndarray,
    place_DF: np.ndarray,
) -> None:
    score_F = np.empty(len(order_F))
    for token in range(len(now_TK)):
        if not judged_T[token]:
            continue
        score_F[:] = 0
        for e in now_TK[token]:
            if e >= 0:
                for f in range(len(score_F)):
                    score_F[f] += share_EF[e, f]
        for f in next_TK[token]:
            if f >= 0:
                place = 0
                for other in range(len(order_F)):
                    ahead = score_F[other] == score_F[f] and order_F[other] < order_F[f]
                    place += score_F[other] > score_F[f] or ahead
                place_DF[domain_T[token], place] += 1


def lengths(count_LEM: np.ndarray) -> np.ndarray:
    """1 over the Euclidean length of every row of matrices [L, M], float32; 0 where the row is empty."""
    length_LM = np.sqrt((count_LEM**2).sum(1))
    return np.divide(1, length_LM, out=np.zeros_like(length_LM), where=length_LM > 0)


@compiled
def nearest(
    index_LTK: np.ndarray, count_LEM: np.ndarray, inverse_LM: np.ndarray, order_LE: np.ndarray, place_LE: np.ndarray
) -> None:
    """Follow one document; guess the next layer from the stored matrix that is nearest to the document's own so far.

    A matrix counts how often a document took each expert of each layer. The nearest has the highest sum of the cosines
    of the rows of the layers that the token has been through (MoE-Infinity, arXiv 2401.14361). The released code
    (`find_most_similar` of moe_infinity/memory/expert_tracer.py) blanks just those rows of the stored matrices, so it
    compares the rows of the layers to come.

    Args:
        index_LTK: the document's experts, negative where there is none.
        count_LEM: the stored matrices, float32.
        inverse_LM: `lengths` of them.
        order_LE: the place of each expert in the order that breaks ties.
        place_LE: where the places of what came are counted; none at the first layer.
    """
    layers, experts, matrices = count_LEM.shape
    own_LE, square_L = np.zeros((layers, experts)), np.zeros(layers)
    dot_LM, near_M = np.zeros((layers, matrices), np.float32), np.empty(matrices, np.float32)
    for token in range(index_LTK.shape[1]):
        near_M[:] = 0
        best = 0
        for layer in range(layers):
            for f in index_LTK[layer, token]:
                if f >= 0 and layer > 0:
                    count, place = count_LEM[layer, f, best], 0
                    for other in range(experts):
                        more = count_LEM[layer, other, best]
                        place += more > count or (more == count and order_LE[layer, other] < order_LE[layer, f])
                    place_LE[layer, place] += 1
            for e in index_LTK[layer, token]:
                if e >= 0:
                    square_L[layer] += 2 * own_LE[layer, e] + 1
                    own_LE[layer, e] += 1
                    for m in range(matrices):
                        dot_LM[layer, m] += count_LEM[layer, e, m]
            if square_L[layer] > 0:
                scale = np.float32(1 / np.sqrt(square_L[layer]))
                for m in range(matrices):
                    near_M[m] += dot_LM[layer, m] * inverse_LM[layer, m] * scale
            best = int(np.argmax(near_M))
