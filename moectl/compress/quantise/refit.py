"""The best levels for ternary codes that are given.

G matrices, R rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.compress.quantise.gptq import Factor
from moectl.compress.quantise.levels import rounded

_RIDGE = 1e-6
"""What is added to the diagonal of each row's two equations, relative to it, so that they can always be solved."""


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
    kept_GR = factored.inner(better_off_GNR, better_off_GNR) < factored.inner(off_GNR, off_GNR)
    return (
        torch.where(kept_GR[..., None], better_GR2, levels_GR2),
        torch.where(kept_GR[:, None], better_off_GNR, off_GNR),
    )
