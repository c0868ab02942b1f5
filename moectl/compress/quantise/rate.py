"""Ternary matrices at a number of bits that is asked for.

G matrices, R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from moectl.codecs.encoding import encode
from moectl.codecs.entries import UNUSED
from moectl.codecs.qmoe import PAIRS
from moectl.codecs.tables import QMOE, choose, table
from moectl.compress.quantise.piece import Piece, to_numpy
from moectl.errors import InputError

COUNT_BITS, CODE_BITS = 16, 16
"""Of the number of codewords of a row, and of a codeword."""

USUAL = 0.9
"""Bits of a weight's code where no number is asked for: with what rows take, less than one from a width of 480 on."""

SAMPLED = 64
"""Rows of each matrix that the size of levels is found with."""

TRIES = 5
CLOSE = 0.005
ENOUGH = 0.01
"""How far from the target, relative to it, a sample may be left, and all rows."""

_LEAST, _MOST = -9.0, 9.0
_LONGEST_STEP = 1.5
"""Of the logarithm of the size of levels."""

_SLOPE = -0.8
_SLOPES = (-2.0, -0.2)
"""Of bits over it: what is assumed first, and the limits of what is believed."""


def row_bits(dtype: torch.dtype) -> int:
    """Bits of a row besides its codewords: their number and two levels."""
    return COUNT_BITS + 2 * 8 * dtype.itemsize


def usual_bits(width: int, dtype: torch.dtype) -> float:
    """Bits a weight where no number is asked for."""
    return USUAL + row_bits(dtype) / width


def least_bits(width: int, code: str, dtype: torch.dtype) -> float:
    """The least that can be asked for, in bits a weight: a quarter more than rows of nothing but zeros take."""
    longest = PAIRS * 2 if code == "qmoe" else UNUSED
    return 1.25 * (row_bits(dtype) + CODE_BITS * -(-width // longest)) / width


def check_possible(target: float, width: int, code: str, dtype: torch.dtype) -> None:
    """Refuse what would leave hardly any weights.

    Raises:
        InputError: rows of this width take more.
    """
    least = least_bits(width, code, dtype)
    if target < least:
        raise InputError(
            f"Matrices with rows of {width} weights cannot have {target:g} bits a weight.",
            f"Each row takes {row_bits(dtype)} bits besides its weights, and a codeword has {CODE_BITS}.",
            f"Ask for {ceil(100 * least) / 100:.2f} bits or more." if least < 1.9 else "Ask for 2, 3 or 4 bits.",
        )


def bits(trits_GRN: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    """Bits a weight of ternary matrices, encoded with the table that suits each: what their blob takes, [G].

    Args:
        trits_GRN: -1, 0 and 1, int8.
        code: `tunstall` or `qmoe`.
        dtype: of levels.
    """
    rates = []
    for matrix in to_numpy(trits_GRN):
        number = QMOE if code == "qmoe" else choose(float((matrix == 0).mean()))
        codes, _ = encode(matrix, table(number))
        rates.append((CODE_BITS * len(codes) + row_bits(dtype) * len(matrix)) / matrix.size)
    return torch.tensor(rates, dtype=torch.float32, device=trits_GRN.device)


def meet(
    target: float, weight_GRN: Tensor, rate: Callable[[Tensor, Tensor], Tensor], whole: Callable[[Tensor], Piece]
) -> Piece:
    """What comes of levels of the size with which matrices take the bits that are asked for, or fewer if they must.

    Rows are quantised independently, so sizes are found with a few of each matrix, from large to small ones.

    Args:
        target: bits a weight.
        weight_GRN: matrices.
        rate: bits a weight of some rows of each matrix at a size for each, [G].
        whole: all rows, quantised at a size for each matrix; `bits_G` is looked at.
    """
    order_GR = weight_GRN.square().sum(2).argsort(1)
    rows = weight_GRN.shape[1]
    sampled = min(rows, SAMPLED)
    picked = (2 * torch.arange(sampled, device=weight_GRN.device) + 1) * rows // (2 * sampled)
    sample_GRN = weight_GRN.gather(1, order_GR[:, picked, None].expand(-1, -1, weight_GRN.shape[2]))

    log_G = weight_GRN.new_full((len(weight_GRN),), _guess(target))
    slope_G = torch.full_like(log_G, _SLOPE)
    rate_G = rate(sample_GRN, log_G.exp())
    for _ in range(TRIES):
        next_G = _step(log_G, rate_G, slope_G, target, CLOSE)
        moved_G = next_G - log_G
        if not moved_G.any():
            break
        next_rate_G = rate(sample_GRN, next_G.exp())
        slope_G = torch.where(moved_G != 0, ((next_rate_G - rate_G) / moved_G).clamp(*_SLOPES), slope_G)
        log_G, rate_G = next_G, next_rate_G
    found = whole(log_G.exp())
    again_G = _step(log_G, found["bits_G"], slope_G, target, ENOUGH)
    if torch.equal(again_G, log_G):
        return found
    other = whole(again_G.exp())
    closer_G = (other["bits_G"] - target).abs() < (found["bits_G"] - target).abs()
    return {
        key: torch.where(closer_G.view(-1, *[1] * (each.ndim - 1)), other[key], each) for key, each in found.items()
    }


def _guess(target: float) -> float:
    """The logarithm of a size, a straight line through what normal weights need from 0.6 to 1.3 bits."""
    return 2.3 - 1.25 * target


def _step(log_G: Tensor, rate_G: Tensor, slope_G: Tensor, target: float, close: float) -> Tensor:
    """Logarithms of sizes that should come nearer; those that are close already as they are."""
    missed_G = target - rate_G
    step_G = (missed_G / slope_G).clamp(-_LONGEST_STEP, _LONGEST_STEP)
    next_G = (log_G + step_G).clamp(_LEAST, _MOST)
    return torch.where(missed_G.abs() <= close * target, log_G, next_G)
