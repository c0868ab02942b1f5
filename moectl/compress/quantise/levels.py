"""What + and - stand for in the rows of ternary matrices, and when a weight is rounded to them.

G matrices, R rows, N columns. A pair of levels is [G, R, 2], the one of - first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels and thresholds of rows.

    Attributes:
        values_GR2: levels.
        cuts_GR2: a weight below the first becomes -, one above the second +.
    """

    values_GR2: Tensor
    cuts_GR2: Tensor

    def value(self, target_GR: Tensor) -> Tensor:
        """What the weights of a column become."""
        under_GR, over_GR = self.cuts_GR2.unbind(2)
        low_GR, high_GR = self.values_GR2.unbind(2)
        return torch.where(target_GR > over_GR, high_GR, torch.where(target_GR < under_GR, low_GR, 0))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels as they will be stored."""
    return values.to(dtype).to(values.dtype)


def of_the_paper(
    weight_GRN: Tensor, dtype: torch.dtype, *, times: float = 1.0, means: bool = False, symmetric: bool = False
) -> Levels:
    """Thresholds at half the largest and least weight of a row (arXiv 2310.16795; IST-DASLab/qmoe, quant.py).

    Args:
        weight_GRN: the weights before GPTQ.
        dtype: of stored levels.
        times: what thresholds are multiplied by.
        means: levels are the means of the weights beyond the thresholds; otherwise the largest and the least weight.
        symmetric: levels are what both sides have together, with either sign.
    """
    ends_GR2 = torch.stack([weight_GRN.amin(2).clamp(max=0), weight_GRN.amax(2).clamp(min=0)], 2)
    cuts_GR2 = ends_GR2 * (times / 2)
    if means:
        ends_GR2 = _means(weight_GRN, cuts_GR2, symmetric)
    elif symmetric:
        half_GR = (ends_GR2[..., 1] - ends_GR2[..., 0]) / 2
        ends_GR2 = torch.stack([-half_GR, half_GR], 2)
    return Levels(rounded(ends_GR2, dtype), cuts_GR2)


def spread(weight_GRN: Tensor, times_G: Tensor, dtype: torch.dtype) -> Levels:
    """Levels at so many root mean squares of a row on both sides of zero, and thresholds half way.

    They are larger than what makes the error of a weight alone least, and have to be: GPTQ moves the errors of columns
    into later ones along the few directions in which inputs are strong, and a grid that ends early cannot take them.
    With levels and thresholds that minimise the error of weights or, weighted, of outputs, a small trained model lost
    0.024 nats a token at 0.99 bits, with these 0.005 (benchmarks/compress_peers.py, seed 0).

    Args:
        weight_GRN: the weights before GPTQ.
        times_G: for each matrix; the more, the more zeros.
        dtype: of stored levels.
    """
    level_GR = rounded(times_G[:, None] * weight_GRN.square().mean(2).sqrt(), dtype)
    values_GR2 = torch.stack([-level_GR, level_GR], 2)
    return Levels(values_GR2, values_GR2 / 2)


def _means(weight_GRN: Tensor, cuts_GR2: Tensor, symmetric: bool) -> Tensor:
    """The means of what is below the first and above the second threshold, 0 where nothing is."""
    beyond_GRN2 = torch.stack([weight_GRN < cuts_GR2[..., :1], weight_GRN > cuts_GR2[..., 1:]], 3)
    count_GR2, sum_GR2 = beyond_GRN2.sum(2), (beyond_GRN2 * weight_GRN[..., None]).sum(2)
    if symmetric:
        half_GR = sum_GR2[..., 1] - sum_GR2[..., 0]
        count_GR2 = count_GR2.sum(2, keepdim=True).expand_as(count_GR2)
        sum_GR2 = torch.stack([-half_GR, half_GR], 2)
    return torch.where(count_GR2 > 0, sum_GR2 / count_GR2, 0)
