"""Who gets a place when an expert has too few: groups of tokens, rooms and queues.

Places are counted as if nothing were dropped, so that one queue answers for every room: all of these conventions count
what was dropped in an earlier rank too, or drop it because there is no place left for the later ones either.
Legend: T tokens, K choices, S = T*K assignments, G groups of tokens that share places, B buckets (experts or devices).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.compiled import compiled
from moectl.traces.trace import Tokens


@dataclass(frozen=True, slots=True)
class Groups:
    """Neighbouring tokens that share places.

    Attributes:
        start_G: the first token of each, and the number of all tokens at the end [G + 1].
        group_T: which one each token is in.
    """

    start_G: np.ndarray
    group_T: np.ndarray

    @property
    def size_G(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.start_G)

    @property
    def within_T(self) -> np.ndarray:
        """The place of each token in its group, from 0."""
        return np.arange(len(self.group_T)) - self.start_G[self.group_T]


def groups(tokens: Tokens, size: int) -> Groups:
    """Groups of `size` tokens, the last one smaller; 0: a group for each document."""
    inner = np.flatnonzero(np.diff(tokens.document_T)) + 1 if size == 0 else np.arange(size, len(tokens), size)
    start_G = np.concatenate([[0], inner, [len(tokens)]]).astype(np.int64)
    return Groups(start_G, np.repeat(np.arange(len(start_G) - 1), np.diff(start_G)))


def by_rank(of: Groups, top_k: int, priority_T: np.ndarray | None = None) -> np.ndarray:
    """The assignments in the order of the queue [S]: all first choices of a group before any second one.

    Within a rank tokens queue in their order, or by falling priority.
    """
    order_T = np.arange(len(of.group_T))
    if priority_T is not None:
        order_T = np.lexsort((-priority_T, of.group_T))
    start_T, size_T = of.start_G[of.group_T], of.size_G[of.group_T]
    rank_K = np.arange(top_k)
    at_TK = (start_T * top_k + of.within_T)[:, None] + rank_K * size_T[:, None]
    order_S = np.empty(at_TK.size, np.int64)
    order_S[at_TK] = order_T[:, None] * top_k + rank_K
    return order_S


def by_weight(of: Groups, weight_TK: np.ndarray) -> np.ndarray:
    """The assignments of each group by falling weight, whatever their rank [S]; the earlier token first of equals."""
    return np.lexsort((-weight_TK.ravel(), np.repeat(of.group_T, weight_TK.shape[1])))


def places(bucket_TK: np.ndarray, order_S: np.ndarray, of: Groups, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each assignment in its bucket's queue, from 0, int32 [T, K], and how long the queues are [G, B].

    A negative bucket stands in no queue.
    """
    place_TK = np.full(bucket_TK.shape, -1, np.int32)
    count_GB = np.zeros((len(of.start_G) - 1, buckets), np.int64)
    _queue(
        np.ascontiguousarray(bucket_TK).ravel(), order_S, of.start_G * bucket_TK.shape[1], place_TK.ravel(), count_GB
    )
    return place_TK, count_GB


@compiled
def _queue(
    bucket_S: np.ndarray, order_S: np.ndarray, start_G: np.ndarray, place_S: np.ndarray, count_GB: np.ndarray
) -> None:
    for group in range(len(start_G) - 1):
        for at in range(start_G[group], start_G[group + 1]):
            bucket = bucket_S[order_S[at]]
            if bucket >= 0:
                place_S[order_S[at]] = count_GB[group, bucket]
                count_GB[group, bucket] += 1
