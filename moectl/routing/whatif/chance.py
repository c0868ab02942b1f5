"""What random routing gives, in closed form: a token's experts are drawn by a fair lot, without replacement.

Legend: T tokens, K experts per token, J numbers of choices 0..K (less than K where some were dropped), D groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np
from scipy.special import bdtrc

Shares = tuple[float, ...]


def choices(index_TK: np.ndarray) -> Shares:
    """Which share of the tokens has 0, 1, ... K experts."""
    count_J = np.bincount((index_TK >= 0).sum(1), minlength=index_TK.shape[1] + 1)
    return tuple((count_J / max(len(index_TK), 1)).tolist())


@lru_cache(maxsize=4096)
def inside(experts: int, size: int, share_J: Shares) -> Shares:
    """How likely 0, 1, ... K of a token's experts are among `size` certain ones: hypergeometric, mixed over J."""
    chance_J = np.zeros(len(share_J))
    for chosen, share in enumerate(share_J):
        for among in range(max(0, chosen - (experts - size)), min(chosen, size) + 1 if share else 0):
            ways = comb(size, among) * comb(experts - size, chosen - among) / comb(experts, chosen)
            chance_J[among] += share * ways
    return tuple(chance_J.tolist())


def groups_met(experts: int, sizes_D: Sequence[int] | np.ndarray, share_J: Shares) -> float:
    """How many of the groups of experts a token meets: for D even ones D * (1 - C(E - E/D, k) / C(E, k))."""
    return sum(1 - inside(experts, int(size), share_J)[0] for size in sizes_D)


@lru_cache(maxsize=1 << 16)
def overflow(experts: int, size: int, share_J: Shares, tokens: int, room: int) -> float:
    """How many choices, of all that `tokens` tokens make of `size` experts, are more than `room`: the mean.

    One expert's load is binomial; several are not, as those of a token are not independent.
    """
    if room >= min(size, len(share_J) - 1) * tokens:
        return 0.0
    if size == 1:
        p = inside(experts, 1, share_J)[1]
        return max(0.0, float(tokens * p * bdtrc(room - 1, tokens - 1, p) - room * bdtrc(room, tokens, p)))
    above_N = _loads(experts, size, share_J, tokens)[room + 1 :]
    return max(0.0, float(above_N @ np.arange(1, len(above_N) + 1)))


@lru_cache(maxsize=64)
def _loads(experts: int, size: int, share_J: Shares, tokens: int) -> np.ndarray:
    """How likely that many tokens make 0, 1, 2, ... choices of those experts: the power of one token's, by Fourier."""
    length = (len(share_J) - 1) * tokens + 1
    return np.fft.irfft(np.fft.rfft(inside(experts, size, share_J), length) ** tokens, length)
