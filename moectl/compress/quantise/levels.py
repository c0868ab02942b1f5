"""What + and - stand for in the rows of ternary matrices, and when a weight is rounded to them.

G matrices, R rows, N columns. A pair of levels is [G, R, 2], the one of - first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRIDES = (8, 8, 8, 8, 1, 1)
"""Every how many columns each step of `priced` looks at: the first ones only have to come close."""

_FEW = 1024
"""Columns of a row that are looked at in every step."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels and thresholds of rows. In column n, + begins above `halves` plus `slack` / s_n, and - below the same.

    Attributes:
        values_GR2: levels.
        halves_GR2: thresholds where the strength s of an input does not matter.
        slack_GR2: what an input of strength 1 adds to them.
    """

    values_GR2: Tensor
    halves_GR2: Tensor
    slack_GR2: Tensor

    def value(self, target_GR: Tensor, strength_G: Tensor) -> Tensor:
        """What the weights of a column become."""
        under_GR, over_GR = (self.halves_GR2 + self.slack_GR2 / strength_G[:, None, None]).unbind(2)
        low_GR, high_GR = self.values_GR2.unbind(2)
        return torch.where(target_GR > over_GR, high_GR, torch.where(target_GR < under_GR, low_GR, 0))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels as they will be stored."""
    return values.to(dtype).to(values.dtype)


def of_the_paper(
    weight_GRN: Tensor, times: float, means: bool, dtype: torch.dtype, *, symmetric: bool = False
) -> Levels:
    """Thresholds at half the largest and least weight of a row (arXiv 2310.16795; IST-DASLab/qmoe, quant.py).

    Args:
        weight_GRN: the weights before GPTQ.
        times: what thresholds are multiplied by.
        means: levels are the means of the weights beyond the thresholds; otherwise the largest and the least weight.
        dtype: of stored levels.
        symmetric: the mean on both sides together, with either sign.
    """
    ends_GR2 = torch.stack([weight_GRN.amin(2).clamp(max=0), weight_GRN.amax(2).clamp(min=0)], 2)
    halves_GR2 = ends_GR2 * (times / 2)
    slack_GR2 = torch.zeros_like(halves_GR2)
    if means:
        ends_GR2 = _means(weight_GRN, torch.ones_like(weight_GRN[:, 0]), halves_GR2, slack_GR2, symmetric)
    return Levels(rounded(ends_GR2, dtype), halves_GR2, slack_GR2)


def usual_price(weight_GRN: Tensor, strength_GN: Tensor) -> Tensor:
    """The mean square of weights times the geometric mean of strengths, [G]: about the same multiple of it leads to the
    same share of zeros, whatever weights and inputs are."""
    square_G = weight_GRN.square().mean(2).double().mean(1)
    return (square_G * strength_GN.double().log().mean(1).exp()).to(weight_GRN.dtype)


def priced(
    weight_GRN: Tensor, strength_GN: Tensor, price_G: Tensor, dtype: torch.dtype, *, symmetric: bool = False
) -> Levels:
    """Levels and thresholds for the least sum of errors, times strengths of inputs, and a price for each + and -.

    Of a weight t, s (t - level)^2 + price is less than s t^2 beyond level / 2 + price / (2 level s): a weak input gets
    more zeros. For given thresholds the best levels are means weighted by s. The two take turns (Lloyd). Strengths are
    the roots of mean squares: with the mean squares themselves, which an error counts, errors are less on the tokens
    that were seen, and a few strong inputs take the weights of all others; small trained models lost 0.005 to 0.013
    nats per byte more with them at 1.1 to 1.4 bits (benchmarks/compress_table.py).

    Args:
        weight_GRN: the weights before GPTQ.
        strength_GN: of inputs.
        price_G: of a weight of each matrix.
        dtype: of stored levels.
        symmetric: the same level on both sides.
    """
    price_GR1 = price_G[:, None, None]
    start_GR = (2 * weight_GRN.square().mean(2) + price_GR1[..., 0]).sqrt()
    values_GR2 = torch.stack([-start_GR, start_GR], 2)
    for stride in _STRIDES:
        columns = slice(None, None, stride if weight_GRN.shape[2] > _FEW else 1)
        slack_GR2 = _slack(price_GR1, values_GR2)
        seen_GRN, strong_GN = weight_GRN[..., columns], strength_GN[:, columns]
        values_GR2 = _means(seen_GRN, strong_GN, values_GR2 / 2, slack_GR2, symmetric)
    values_GR2 = rounded(values_GR2, dtype)
    return Levels(values_GR2, values_GR2 / 2, _slack(price_GR1, values_GR2))


def _slack(price_GR1: Tensor, values_GR2: Tensor) -> Tensor:
    """What a price adds to thresholds: all there is on a side without a level, so that nothing is beyond."""
    never_2 = values_GR2.new_tensor([-torch.inf, torch.inf])
    return torch.where(values_GR2 == 0, never_2, price_GR1 / (2 * values_GR2))


def _means(weight_GRN: Tensor, strength_GN: Tensor, halves_GR2: Tensor, slack_GR2: Tensor, symmetric: bool) -> Tensor:
    """The weighted means of what is below the first and above the second threshold, 0 where nothing is."""
    heavy, total = [], []
    for side, sign in enumerate((-1, 1)):
        cut_GRN = torch.addcmul(halves_GR2[..., side, None], slack_GR2[..., side, None], 1 / strength_GN[:, None])
        beyond_GRN = (weight_GRN > cut_GRN if sign > 0 else weight_GRN < cut_GRN).to(weight_GRN.dtype)
        heavy.append(torch.bmm(beyond_GRN, strength_GN[..., None])[..., 0])
        total.append(torch.bmm(beyond_GRN.mul_(weight_GRN), strength_GN[..., None])[..., 0])
    heavy_GR2, sum_GR2 = torch.stack(heavy, 2), torch.stack(total, 2)
    if symmetric:
        heavy_GR2 = heavy_GR2.sum(2, keepdim=True).expand_as(heavy_GR2)
        half_GR = sum_GR2[..., 1] - sum_GR2[..., 0]
        sum_GR2 = torch.stack([-half_GR, half_GR], 2)
    return torch.where(heavy_GR2 > 0, sum_GR2 / heavy_GR2, 0)
