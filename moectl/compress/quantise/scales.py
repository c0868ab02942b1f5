"""Scales and zeros of uniform grids: the range of each group of a row, as in GPTQ (arXiv 2210.17323, section 4).

G matrices, R rows, N columns, S groups of a row, B columns of a group.

They are those of the weights as they were, not as GPTQ has changed them when it comes to a group: only so can columns
be swept in an order that is not that of the groups. A range is never shrunk, though the error of weights by themselves
would be less: GPTQ moves errors into later columns along the few directions in which inputs are strong, and a grid that
ends early cannot take them. With ranges for the least error a small trained model lost 0.007 nats a token at 2 bits,
and with none shrunk 0.001 or less (benchmarks/compress_peers.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def number(target: Tensor, scale: Tensor, point: Tensor, bits: int) -> Tensor:
    """The nearest whole number from 0 to 2^bits - 1, where `point` stands for zero."""
    return (target / scale + point).round_().clamp_(0, (1 << bits) - 1)


def ranges(weight_GRN: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, as they will be stored, and zeros of all groups, [G, R, S].

    Args:
        weight_GRN: matrices.
        bits: of a number.
        group: columns of a group; the last of a row may have fewer.
        symmetric: 2^(bits - 1) is zero everywhere.
        dtype: of stored scales.
    """
    top = (1 << bits) - 1
    weight_GRSB = pad(weight_GRN, (0, -weight_GRN.shape[2] % group)).unflatten(2, (-1, group))
    low_GRS, high_GRS = weight_GRSB.amin(3).clamp(max=0), weight_GRSB.amax(3).clamp(min=0)
    if symmetric:
        range_GRS = 2 * torch.maximum(-low_GRS, high_GRS)
        point_GRS = torch.full_like(range_GRS, 1 << bits - 1)
    else:
        range_GRS = high_GRS - low_GRS
        point_GRS = torch.where(range_GRS > 0, -low_GRS / range_GRS * top, 0).round()
    # With a larger scale the ends would be no numbers of the type, in float16.
    most_GRS = 0.99 * torch.finfo(dtype).max / torch.maximum(point_GRS, top - point_GRS).clamp(min=1)
    scale_GRS = (range_GRS / top).minimum(most_GRS).to(dtype).to(range_GRS.dtype)
    return torch.where(scale_GRS > 0, scale_GRS, 1), point_GRS
