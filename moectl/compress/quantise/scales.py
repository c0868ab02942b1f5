"""Scales and zeros of uniform grids, found before GPTQ by trying.

G matrices, R rows, N columns, S groups of a row, B columns of a group.

Group scales are found for the weights as they were, not as GPTQ has changed them when it comes to a group: only so can
columns be swept in an order that is not that of the groups. Errors count the mean square of their
input. Shrinking the grid and moving its zero are tried together: at 2 bits moving it saves 5 to 12 % of the error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""What the range of a group is multiplied by."""

FINE = (0.05, 0.025)
"""How far to both sides of the best it is looked then."""

MOVED = (0, -1, 1)
"""Where the zero is tried, in steps from where the range puts it."""


def number(target: Tensor, scale: Tensor, point: Tensor, bits: int) -> Tensor:
    """The nearest whole number from 0 to 2^bits - 1, where `point` stands for zero."""
    return (target / scale + point).round_().clamp_(0, (1 << bits) - 1)


def fitted(
    weight_GRN: Tensor, strength_GN: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales, as they will be stored, and zeros of all groups, [G, R, S].

    Args:
        weight_GRN: matrices.
        strength_GN: of inputs, what a square error in a column counts.
        bits: of a number.
        group: columns of a group; the last of a row may have fewer.
        symmetric: 2^(bits - 1) is zero everywhere.
        dtype: of stored scales.
    """
    short = -weight_GRN.shape[2] % group
    found = []
    for weight_RN, strength_N in zip(weight_GRN, strength_GN, strict=True):
        weight_RSB = pad(weight_RN, (0, short)).unflatten(1, (-1, group))
        strength_SB = pad(strength_N, (0, short)).unflatten(0, (-1, group))
        found.append(_fitted(weight_RSB, strength_SB, bits, symmetric, dtype))
    scales, points = zip(*found, strict=True)
    return torch.stack(scales), torch.stack(points)


def _fitted(
    weight_RSB: Tensor, strength_SB: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    top = (1 << bits) - 1
    low_RS, high_RS = weight_RSB.amin(2).clamp(max=0), weight_RSB.amax(2).clamp(min=0)
    if symmetric:
        range_RS = 2 * torch.maximum(-low_RS, high_RS)
        points = [torch.full_like(range_RS, 1 << bits - 1)]
    else:
        range_RS = high_RS - low_RS
        middle_RS = torch.where(range_RS > 0, -low_RS / range_RS * top, 0).round()
        points = [(middle_RS + moved).clamp(0, top) for moved in MOVED]

    def attempt(shrink_RS: Tensor | float, point_RS: Tensor) -> tuple[Tensor, ...]:
        scale_RS = (range_RS * shrink_RS / top).to(dtype).to(range_RS.dtype)
        scale_RS = torch.where(scale_RS > 0, scale_RS, 1)
        held_RS = (scale_RS * torch.maximum(point_RS, top - point_RS)).to(dtype).isfinite()  # the ends, in float16
        scale_RS1, point_RS1 = scale_RS[..., None], point_RS[..., None]
        off_RSB = number(weight_RSB, scale_RS1, point_RS1, bits).sub_(point_RS1).mul_(scale_RS1).sub_(weight_RSB)
        loss_RS = torch.einsum("rsb,sb->rs", off_RSB.square_(), strength_SB).where(held_RS, torch.inf)
        return loss_RS, torch.as_tensor(shrink_RS).expand_as(loss_RS), scale_RS, point_RS

    best = attempt(COARSE[0], points[0])
    for shrink in COARSE:
        for point_RS in points:
            best = _better(best, attempt(shrink, point_RS))
    for step in FINE:
        shrink_RS, point_RS = best[1], best[3]
        best = _better(_better(best, attempt(shrink_RS - step, point_RS)), attempt(shrink_RS + step, point_RS))
    return best[2], best[3]


def _better(best: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    better = other[0] < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
