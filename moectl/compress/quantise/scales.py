"""Scales and zeros of uniform grids, found before GPTQ by trying.

G matrices, R rows, N columns, S groups of a row, B columns of a group.

Group scales are found for the weights as they were, not as GPTQ has changed them when it comes to a group: only so can
columns be swept in an order that is not that of the groups. The range of a group is hardly ever shrunk, though the
error of weights by themselves would be less: GPTQ moves errors into later columns along the few directions in which
inputs are strong, and a grid that ends early cannot take them. With ranges for the least error a small trained model
lost 0.007 nats a token at 2 bits, so 0.001 (benchmarks/compress_peers.py, seed 0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SHRUNK = (1.0, 0.9)
"""What the range of a group is multiplied by."""


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
        point_RS = torch.full_like(range_RS, 1 << bits - 1)
    else:
        range_RS = high_RS - low_RS
        point_RS = torch.where(range_RS > 0, -low_RS / range_RS * top, 0).round()

    # With a larger scale the ends would be no numbers of the type, in float16.
    most_RS = 0.99 * torch.finfo(dtype).max / torch.maximum(point_RS, top - point_RS).clamp(min=1)

    def attempt(shrink: float) -> tuple[Tensor, Tensor]:
        scale_RS = (range_RS * shrink / top).minimum(most_RS).to(dtype).to(range_RS.dtype)
        scale_RS = torch.where(scale_RS > 0, scale_RS, 1)
        scale_RS1, point_RS1 = scale_RS[..., None], point_RS[..., None]
        off_RSB = number(weight_RSB, scale_RS1, point_RS1, bits).sub_(point_RS1).mul_(scale_RS1).sub_(weight_RSB)
        return torch.einsum("rsb,sb->rs", off_RSB.square_(), strength_SB), scale_RS

    best_RS, scale_RS = attempt(SHRUNK[0])
    for shrink in SHRUNK[1:]:
        loss_RS, other_RS = attempt(shrink)
        scale_RS = torch.where(loss_RS < best_RS, other_RS, scale_RS)
        best_RS = torch.minimum(best_RS, loss_RS)
    return scale_RS, point_RS
