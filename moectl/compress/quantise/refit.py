"""The best levels for ternary codes that are given: those of least error, stretched to the energy of the original.

G matrices, R rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.compress.quantise.gptq import Factor
from moectl.compress.quantise.levels import rounded

_RIDGE = 1e-6
"""What is added to the diagonal of each row's two equations, relative to it, so that they can always be solved."""

_WORTH = 1 - 1e-5
"""Of the error a row had: what is not better than that may be rounding, and is not taken."""

_LEAST_GAIN = 0.05
"""Rows that keep less of their outputs are not stretched further."""


def refit(
    factored: Factor,
    through_GNR: Tensor,
    trits_GNR: Tensor,
    levels_GR2: Tensor,
    off_GNR: Tensor,
    dtype: torch.dtype,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Levels with which the damped error of each row is least, or those it had where it is not less with them.

    Args:
        factored: the Hessians.
        through_GNR: W (1 + F).
        trits_GNR: codes, which stay.
        levels_GR2: levels, as they are stored.
        off_GNR: (W - Q) (1 + F) with these levels.
        dtype: of stored levels.
        symmetric: + and - keep the same level.

    Returns:
        Levels and what is off with them.
    """
    plus_GNR = factored.through((trits_GNR > 0).to(off_GNR.dtype))
    low_GR, high_GR = (level[:, None] for level in levels_GR2.unbind(2))
    minus_GNR = through_GNR - off_GNR - high_GR * plus_GNR
    minus_GNR = torch.where(low_GR != 0, minus_GNR / low_GR, 0)
    minus_minus, both, plus_plus = (
        factored.inner(*pair) for pair in ((minus_GNR, minus_GNR), (minus_GNR, plus_GNR), (plus_GNR, plus_GNR))
    )
    ridge = _RIDGE * (minus_minus + plus_plus)
    minus_minus, plus_plus = minus_minus + ridge, plus_plus + ridge
    minus_off, plus_off = factored.inner(minus_GNR, off_GNR), factored.inner(plus_GNR, off_GNR)
    if symmetric:
        more_GR2 = (plus_off - minus_off)[..., None] * levels_GR2.new_tensor([-1.0, 1.0])
        determinant = (minus_minus + plus_plus - 2 * both)[..., None]
    else:
        more_GR2 = torch.stack([plus_plus * minus_off - both * plus_off, minus_minus * plus_off - both * minus_off], 2)
        determinant = (minus_minus * plus_plus - both.square())[..., None]
    more_GR2 = torch.where(determinant > 0, more_GR2 / determinant, 0)
    better_GR2 = rounded(levels_GR2 + more_GR2, dtype)
    change_GR2 = better_GR2 - levels_GR2
    better_off_GNR = off_GNR - change_GR2[:, None, :, 0] * minus_GNR - change_GR2[:, None, :, 1] * plus_GNR
    kept_GR = factored.inner(better_off_GNR, better_off_GNR) < _WORTH * factored.inner(off_GNR, off_GNR)
    return (
        torch.where(kept_GR[..., None], better_GR2, levels_GR2),
        torch.where(kept_GR[:, None], better_off_GNR, off_GNR),
    )


def stretch(
    factored: Factor, through_GNR: Tensor, trits_GNR: Tensor, levels_GR2: Tensor, off_GNR: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Levels times one number for each row, so that its outputs have about the energy that they had.

    With the levels of least error a row's outputs are too small, by the part of them that is lost, and in an expert
    three such matrices multiply. On small trained models stretching was worth 0.003 nats a token at 0.99 bits and 0.022
    nats a byte at 1.35, though it makes the error of each matrix by itself larger; stretching until the
    mean is right (the square of this) was worse than nothing. Arguments and what is returned are those of `refit`.
    """
    whole_GR = factored.inner(through_GNR, through_GNR)
    gain_GR = 1 - factored.inner(off_GNR, through_GNR) / whole_GR
    gain_GR = torch.where(whole_GR > 0, gain_GR.clamp(_LEAST_GAIN, 1), 1)
    longer_GR2 = rounded(levels_GR2 * gain_GR.rsqrt()[..., None], dtype)
    longer_GR2 = torch.where(longer_GR2.isfinite().all(2, keepdim=True), longer_GR2, levels_GR2)
    low_GR, high_GR = (level[:, None] for level in longer_GR2.unbind(2))
    values_GNR = torch.where(trits_GNR > 0, high_GR, torch.where(trits_GNR < 0, low_GR, 0))
    return longer_GR2, through_GNR - factored.through(values_GNR)
