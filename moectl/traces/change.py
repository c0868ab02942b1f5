"""What changed in the routing of the same tokens: between checkpoints of a run, precisions, or engines.

Legend: T tokens, K experts per token, E experts, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moectl.errors import InputError
from moectl.traces.statistics import margins, probabilities, require_weights
from moectl.traces.trace import Point, Routed, RoutingTrace


@dataclass(frozen=True, slots=True)
class Saturation:
    """How much of the later routing was there earlier (OLMoE, arXiv 2409.02060, section 5), at one point.

    Attributes:
        value: mean share of a token's k later experts that it had earlier too.
        first: share of tokens with the same first choice.
        chance: of `value`, for independent even choices: k/E.
        chance_loads: of `value`, for independent choices with the loads that were measured.
    """

    point: Point
    value: float
    first: float
    chance: float
    chance_loads: float


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """How late first choices were still others than in the end (StableMoE, arXiv 2204.08396), at one point.

    Attributes:
        share_C: for every trace but the last, the share of tokens whose first choice there, or in one between it and
            the last, is not the last one. It never rises.
    """

    point: Point
    share_C: np.ndarray


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs at one point.

    Attributes:
        ids: share of the experts of the one trace that the same token has not in the other, mean over tokens with any.
        ids_chance: the same for independent choices with the loads that were measured.
        first: share of tokens whose first choice differs.
        first_chance: the same for independent choices with the first choices' loads that were measured.
        tokens: share of tokens whose sets of experts differ.
        weights: total variation between the tokens' combine weights, their sizes made to sum to 1: the share of the
            mixture that moved, mean over tokens that have weights in both. None if not recorded, or if there are none.
        margin_changed, margin_same: median lead of the last chosen expert over the first unchosen one, in the one
            trace's probabilities, of the tokens whose sets differ, and of the others. None without scores or tokens, or
            where something else than the scores chooses too.
    """

    point: Point
    ids: float
    ids_chance: float
    first: float
    first_chance: float
    tokens: float
    weights: float | None
    margin_changed: float | None
    margin_same: float | None


@dataclass(frozen=True, slots=True)
class Differences:
    """What differs between two traces: share of the tokens whose experts differ at any point, and every point."""

    tokens: float
    layers: tuple[Difference, ...]


def saturation(earlier: RoutingTrace, later: RoutingTrace) -> list[Saturation]:
    """How much of the routing of a later checkpoint an earlier one had.

    Raises:
        InputError: the traces are not of the same tokens and points.
    """
    _check_same([earlier, later])
    found = []
    for one, other in zip(earlier.layers, later.layers, strict=True):
        point = other.point
        kept_T = _shared(one.index_TK, other.index_TK).sum(1)
        tokens = max(len(kept_T), 1)
        found.append(
            Saturation(
                point,
                float(kept_T.sum()) / (tokens * point.top_k),
                float((_first(one) == _first(other)).sum()) / tokens,
                point.top_k / point.num_experts,
                _meeting(one.index_TK, other.index_TK) / point.top_k,
            )
        )
    return found


def fluctuation(traces: Sequence[RoutingTrace]) -> list[Fluctuation]:
    """How late first choices still changed, over the checkpoints of a run in their order, at least two.

    Raises:
        InputError: the traces are not of the same tokens and points.
    """
    _check_same(traces)
    found = []
    for layers in zip(*(trace.layers for trace in traces), strict=True):
        differs_CT = np.stack([_first(routed) != _first(layers[-1]) for routed in layers[:-1]])
        later_CT = np.logical_or.accumulate(differs_CT[::-1], axis=0)[::-1]
        found.append(Fluctuation(layers[-1].point, later_CT.sum(1) / max(later_CT.shape[1], 1)))
    return found


def difference(one: RoutingTrace, other: RoutingTrace) -> Differences:
    """What differs between two traces of the same tokens.

    Raises:
        InputError: the traces are not of the same tokens and points, or a weight or a score is NaN or infinite.
    """
    _check_same([one, other])
    anywhere_T = np.zeros(len(one), bool)
    layers = []
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        shared_T = _shared(mine.index_TK, theirs.index_TK).sum(1)
        mine_T, theirs_T = (mine.index_TK >= 0).sum(1), (theirs.index_TK >= 0).sum(1)
        changed_T = (shared_T < mine_T) | (shared_T < theirs_T)
        anywhere_T |= changed_T
        any_T = mine_T > 0
        meeting = _meeting(mine.index_TK, theirs.index_TK)
        margin_changed, margin_same = _margins(mine, changed_T)
        layers.append(
            Difference(
                mine.point,
                _mean(1 - shared_T[any_T] / mine_T[any_T]) or 0.0,
                1 - meeting / float(mine_T.mean()) if any_T.any() else 0.0,
                _mean(_first(mine) != _first(theirs)) or 0.0,
                1 - _meeting(mine.index_TK[:, :1] + 1, theirs.index_TK[:, :1] + 1) if len(one) else 0.0,
                _mean(changed_T) or 0.0,
                _moved(mine, theirs),
                margin_changed,
                margin_same,
            )
        )
    return Differences(_mean(anywhere_T) or 0.0, tuple(layers))


def _first(routed: Routed) -> np.ndarray:
    return routed.index_TK[:, 0]


def _mean(values_T: np.ndarray) -> float | None:
    return float(values_T.mean()) if len(values_T) else None


def _meeting(one_TK: np.ndarray, other_TK: np.ndarray) -> float:
    """How many experts a token of the one trace and any token of the other have in common, mean over all such pairs."""
    most = int(max(one_TK.max(initial=-1), other_TK.max(initial=-1))) + 1
    one_E, other_E = (np.bincount(part_TK[part_TK >= 0], minlength=most) for part_TK in (one_TK, other_TK))
    return float(one_E @ other_E) / max(len(one_TK), 1) ** 2


def _shared(one_TK: np.ndarray, other_TK: np.ndarray) -> np.ndarray:
    """Which of a token's experts in the other trace it has in the one too [T, K]."""
    shared_TK = np.zeros(other_TK.shape, bool)
    for one_T in one_TK.T:
        shared_TK |= (other_TK == one_T[:, None]) & (other_TK >= 0)
    return shared_TK


def _moved(one: Routed, other: Routed) -> float | None:
    """Total variation between the tokens' normalised weights, mean."""
    if one.weight_TK is None or other.weight_TK is None:
        return None
    one_TK, other_TK = _normalised(one, one.weight_TK), _normalised(other, other.weight_TK)
    both_T = (one_TK.sum(1) > 0) & (other_TK.sum(1) > 0)
    # Of the sum over experts: for those of `one` |w - w'|, then what only `other` has.
    apart_T = np.zeros(len(one_TK))
    for a in range(one_TK.shape[1]):
        same_TK = (other.index_TK == one.index_TK[:, a, None]) & (other.index_TK >= 0)
        apart_T += np.abs(one_TK[:, a] - (other_TK * same_TK).sum(1))
    apart_T += (other_TK * ~_shared(one.index_TK, other.index_TK)).sum(1)
    return _mean(apart_T[both_T] / 2)


def _normalised(routed: Routed, weight_TK: np.ndarray) -> np.ndarray:
    weight_TK = np.where(routed.index_TK >= 0, np.abs(weight_TK.astype(np.float64)), 0.0)
    require_weights(routed.point, weight_TK)
    return np.asarray(weight_TK / weight_TK.sum(1, keepdims=True).clip(1e-300))


def _margins(routed: Routed, changed_T: np.ndarray) -> tuple[float | None, float | None]:
    point = routed.point
    if routed.score_TE is None or not point.selects or point.top_k == point.num_experts:
        return None, None
    margin_T = margins(probabilities(point, routed.score_TE), point.top_k)
    changed, same = (
        float(np.median(part)) if len(part) else None for part in (margin_T[changed_T], margin_T[~changed_T])
    )
    return changed, same


def _check_same(traces: Sequence[RoutingTrace]) -> None:
    for number, (one, other) in enumerate(pairwise(traces), 1):
        what = _part_at(one, other)
        if what:
            raise InputError(
                f"Traces {number} and {number + 1} {what}.",
                "Only the routing of the same tokens can be compared.",
                "Capture both with the same data, tokenizer and sequence length.",
            )


def _part_at(one: RoutingTrace, other: RoutingTrace) -> str | None:
    """Where two traces part; None if they are of the same tokens and points. Ids are compared where both have them."""
    mine, theirs = ([_kind(routed.point) for routed in trace.layers] for trace in (one, other))
    if mine != theirs:
        if len(mine) != len(theirs):
            return f"have {len(mine)} and {len(theirs)} MoE layers"
        at = next(number for number, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        kinds = [f"{kind[2]} experts, top {kind[3]}, in {kind[0]} {kind[1]}" for kind in (mine[at], theirs[at])]
        return f"part at MoE layer number {at + 1}: {kinds[0]}, and {kinds[1]}"
    if len(one) != len(other):
        return f"have {len(one)} and {len(other)} tokens"
    for name, mine_T, theirs_T in (
        ("document", one.tokens.document_T, other.tokens.document_T),
        ("position", one.tokens.position_T, other.tokens.position_T),
        ("id", one.tokens.token_T, other.tokens.token_T),
    ):
        differ_T = mine_T != theirs_T
        if name == "id":
            differ_T &= (mine_T >= 0) & (theirs_T >= 0)
        if differ_T.any():
            at = int(differ_T.argmax())
            return f"part at token {at} of {len(one)}: its {name} is {mine_T[at]}, and {theirs_T[at]}"
    return None


def _kind(point: Point) -> tuple[str, int, int, int]:
    return point.role, point.layer, point.num_experts, point.top_k
