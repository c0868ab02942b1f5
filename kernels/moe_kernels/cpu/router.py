"""The router's choice on a CPU in one pass over each token's logits or scores, compiled by numba.

Measured on one Zen 4 core at 4096 tokens, the 8 largest of 128: 0.3 us a token, torch.topk takes 1.3 us.

Legend: T tokens, E values of a row (experts, or groups of them), K wanted, G groups.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from moe_kernels.cpu.compiled import compiled, share

LANES = 16
WORTH_A_THREAD = 1 << 18
"""Values, which take 0.4 to 0.8 ms; a thread takes about 0.1 ms to start, and more where others are busy."""
NO_BIAS = np.empty(0, np.float32)


def choose(
    value_TE: Tensor,
    softmax: bool,
    top_k: int,
    selection_bias_E: Tensor | None,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """index [T, K] and weight [T, K], without a graph, of values in float32; the rest as `reference.route` has it.

    Args:
        value_TE: scores; with `softmax` logits, whose order is that of their softmax: for weights that are renormalised
            and a choice without a bias or sums of scores.
    """
    value = _array(value_TE)
    bias = NO_BIAS if selection_bias_E is None else _array(selection_bias_E)
    best = 0 if top_groups == groups else 2 if group_score == "top2" else 1
    tokens, experts = value.shape
    index, weight = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.float32)
    given = value, softmax, bias, groups, top_groups, best, renormalise, scale, index, weight
    share(_choose, given, tokens, tokens * experts / WORTH_A_THREAD)
    return torch.from_numpy(index), torch.from_numpy(weight)


def top(value_TE: Tensor, top_k: int) -> Tensor:
    """Where the K largest of each row are, int64 [T, K]: the largest first, the lower place first among equals.

    Of float32 or float64. Where a row has a NaN, the places are in range, no two the same, and of no other meaning.
    """
    value = _array(value_TE)
    index = np.empty((len(value), top_k), np.int64)
    if index.size:
        share(_top, (value, index), len(value), value.size / WORTH_A_THREAD)
    return torch.from_numpy(index)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()
    return array


@compiled
def _bound(value_E: np.ndarray, wanted: int, lane_L: np.ndarray) -> float:
    """At most the K-th largest value, and not far below: the K-th largest of the maxima of 16 disjoint parts.

    Without a branch on a value, which would be mispredicted as often as not.
    """
    lane_L[:] = value_E[:LANES]
    for start in range(LANES, len(value_E) - LANES + 1, LANES):
        for lane in range(LANES):
            value = value_E[start + lane]
            lane_L[lane] = value if value > lane_L[lane] else lane_L[lane]
    for sorted_lanes in range(wanted):
        for lane in range(LANES - 1 - sorted_lanes):
            one, other = lane_L[lane], lane_L[lane + 1]
            lane_L[lane], lane_L[lane + 1] = min(one, other), max(one, other)
    return lane_L[LANES - wanted]


@compiled
def _best_two(value_E: np.ndarray, index_K: np.ndarray) -> None:
    """Write where the largest value is, and the second where there is room: choices between numbers, not branches."""
    first, second = 0, 1
    one, two = value_E[0], value_E.dtype.type(-np.inf)
    for place in range(1, len(value_E)):
        value = value_E[place]
        above_one, above_two = value > one, value > two
        second = first if above_one else place if above_two else second
        two = one if above_one else value if above_two else two
        first = place if above_one else first
        one = value if above_one else one
    index_K[0] = first
    if len(index_K) == 2:
        index_K[1] = second


@compiled
def _largest(value_E: np.ndarray, index_K: np.ndarray, place_E: np.ndarray, best_E: np.ndarray) -> None:
    """Write where the K largest values are. `place_E` and `best_E` are room to work in."""
    wanted, candidates = len(index_K), 0
    if wanted <= 2:
        _best_two(value_E, index_K)
        return
    if wanted <= LANES and len(value_E) >= 2 * LANES:
        bound = _bound(value_E, wanted, best_E[:LANES])
        for place in range(len(value_E)):
            place_E[candidates] = place
            candidates += value_E[place] >= bound
    bounded = candidates >= wanted  # not where it is not worth it, nor of a NaN
    for seen in range(candidates if bounded else len(value_E)):
        place = place_E[seen] if bounded else seen
        value = value_E[place]
        if seen >= wanted and value <= best_E[wanted - 1]:
            continue
        to = min(seen, wanted - 1)
        while to > 0 and value > best_E[to - 1]:
            best_E[to], index_K[to] = best_E[to - 1], index_K[to - 1]
            to -= 1
        best_E[to], index_K[to] = value, place


@compiled
def _top(value_TE: np.ndarray, index_TK: np.ndarray, first: int, last: int) -> None:
    """Rows first..last of `top`."""
    place_E, best_E = np.empty(value_TE.shape[1], np.int64), np.empty(value_TE.shape[1], value_TE.dtype)
    for row in range(first, last):
        _largest(value_TE[row], index_TK[row], place_E, best_E)


@compiled
def _close(
    choice_E: np.ndarray, group_G: np.ndarray, best: int, open_N: np.ndarray, place_E: np.ndarray, best_E: np.ndarray
) -> None:
    """Minus infinity to all but the groups whose `best` largest values have the largest sums."""
    groups = len(group_G)
    size = len(choice_E) // groups
    for group in range(groups):
        one = two = choice_E.dtype.type(-np.inf)
        for value in choice_E[group * size : (group + 1) * size]:
            two, one = max(two, min(one, value)), max(one, value)
        group_G[group] = one + two if best == 2 else one
    _largest(group_G, open_N, place_E, best_E)
    place_E[:groups] = 0
    for group in open_N:
        place_E[group] = 1
    for group in range(groups):
        if not place_E[group]:
            choice_E[group * size : (group + 1) * size] = -np.inf


@compiled
def _choose(
    value_TE: np.ndarray,
    softmax: bool,
    bias_E: np.ndarray,
    groups: int,
    top_groups: int,
    best: int,
    renormalise: bool,
    scale: float,
    index_TK: np.ndarray,
    weight_TK: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Rows first..last of `choose`. `best`: by how many of its values a group is ranked, 0 where all are open."""
    experts, real = value_TE.shape[1], value_TE.dtype.type
    place_E, best_E, choice_E = np.empty(experts, np.int64), np.empty(experts, real), np.empty(experts, real)
    group_G, open_N = np.empty(groups, real), np.empty(top_groups, np.int64)
    for row in range(first, last):
        value_E, index_K, weight_K = value_TE[row], index_TK[row], weight_TK[row]
        if best or len(bias_E):
            choice_E[:] = value_E
            for expert in range(len(bias_E)):
                choice_E[expert] += bias_E[expert]
            if best:
                _close(choice_E, group_G, best, open_N, place_E, best_E)
            _largest(choice_E, index_K, place_E, best_E)
        else:
            _largest(value_E, index_K, place_E, best_E)
        largest, total = value_E[index_K[0]], real(0)
        for choice in range(len(index_K)):
            value = value_E[index_K[choice]]
            weight_K[choice] = math.exp(value - largest) if softmax else value
            total += weight_K[choice]
        factor = real(scale) / (total + real(1e-20)) if renormalise else real(scale)
        for choice in range(len(index_K)):
            weight_K[choice] *= factor
