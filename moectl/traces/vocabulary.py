"""Do experts take words? How much of each token id one expert gets (OLMoE, arXiv 2409.02060, section 5).

Only ids that occur often count: an id that is seen once goes to a single expert whatever the router does.
Legend: T tokens, V frequent token ids, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moectl.traces.trace import Point, Routed, RoutingTrace, Tokens

Target = Literal["input", "next", "predicted"]
"""Whose id counts: the token's own, that of the token that follows, or that of the one the model expects to follow."""

MINIMUM = 10
TOP = 15


@dataclass(frozen=True, slots=True)
class Favourite:
    """A token id that an expert is the first choice of: in which share of its `count` occurrences."""

    token: int
    share: float
    count: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How much token ids keep to an expert at one point.

    Attributes:
        value: the largest share of an id's occurrences that one expert is the first choice of, mean over ids.
        null: the same after the ids were shuffled over the tokens, which keeps both marginals.
        ids: how many occur often enough.
        top: for every expert the ids with the largest shares, at most `TOP`, the more frequent first among equals.
    """

    point: Point
    value: float
    null: float
    ids: int
    top: tuple[tuple[Favourite, ...], ...]


def vocabulary(
    trace: RoutingTrace, target: Target = "input", minimum: int = MINIMUM, seed: int = 0
) -> list[Vocabulary]:
    """How much token ids that occur at least `minimum` times keep to an expert, at every point.

    Returns:
        Nothing if no id is that frequent, or if the ids were not recorded.
    """
    id_T = _ids(trace.tokens, target)
    keep_T = id_T >= 0
    id_V, inverse, count_V = np.unique(id_T[keep_T], return_inverse=True, return_counts=True)
    order_V = np.argsort(-count_V, kind="stable")
    order_V = order_V[count_V[order_V] >= minimum]
    if len(order_V) == 0:
        return []
    rank_V = np.full(len(id_V), -1)
    rank_V[order_V] = np.arange(len(order_V))
    rank_T = rank_V[inverse]
    shuffled_T = np.random.default_rng(seed).permutation(rank_T)
    return [_of_point(routed, keep_T, rank_T, shuffled_T, id_V[order_V], count_V[order_V]) for routed in trace.layers]


def _ids(tokens: Tokens, target: Target) -> np.ndarray:
    """The id that counts for each token, -1 where there is none."""
    if target == "input":
        return tokens.token_T
    id_T = np.full(len(tokens), -1)
    if target == "predicted" and tokens.predicted_T is not None:
        return tokens.predicted_T
    if target == "next":
        follows_T = tokens.follows_T[1:]
        id_T[:-1][follows_T] = tokens.token_T[1:][follows_T]
    return id_T


def _of_point(
    routed: Routed,
    keep_T: np.ndarray,
    rank_T: np.ndarray,
    shuffled_T: np.ndarray,
    id_V: np.ndarray,
    count_V: np.ndarray,
) -> Vocabulary:
    first_T = routed.index_TK[keep_T, 0].astype(np.int64)
    experts = routed.point.num_experts
    share_VE = _counts(rank_T, first_T, len(id_V), experts) / count_V[:, None]
    null_VE = _counts(shuffled_T, first_T, len(id_V), experts) / count_V[:, None]
    best_VE = np.argsort(-share_VE, axis=0, kind="stable")[:TOP]
    return Vocabulary(
        routed.point,
        float(share_VE.max(1).mean()),
        float(null_VE.max(1).mean()),
        len(id_V),
        tuple(
            tuple(
                Favourite(int(id_V[rank]), float(share_VE[rank, expert]), int(count_V[rank]))
                for rank in best_VE[:, expert]
                if share_VE[rank, expert] > 0
            )
            for expert in range(experts)
        ),
    )


def _counts(rank_T: np.ndarray, first_T: np.ndarray, ids: int, experts: int) -> np.ndarray:
    """How often each frequent id [V] had each expert [E] for its first choice."""
    both_T = (rank_T >= 0) & (first_T >= 0)
    flat = rank_T[both_T] * experts + first_T[both_T]
    return np.bincount(flat, minlength=ids * experts).reshape(ids, experts)
