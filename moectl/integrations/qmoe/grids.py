"""Experts on uniform grids (`moectl.codecs.grid`) as a model holds them: decoded by numba on a CPU, by torch elsewhere.

Legend: E experts, R rows of a matrix, N weights in a row, G groups in a row, B bytes of a row, A matrices to decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.codecs.grid import GridBlob
from moectl.integrations.qmoe.arrays import array_of, tensor_of


@dataclass(frozen=True)
class GridExperts:
    """The same matrix of all experts.

    Attributes:
        packed_ERB: uint8, numbers of `bits` bits one after another.
        scales_ERG: what a number less its zero is multiplied with; the product is rounded to their type.
        zeros_ERB: uint8, packed too; None where half the range stands for zero.
        width: N.
        group: weights that share a scale.
    """

    packed_ERB: Tensor
    scales_ERG: Tensor
    zeros_ERB: Tensor | None
    bits: int
    width: int
    group: int

    @property
    def experts(self) -> int:
        """E."""
        return len(self.scales_ERG)

    @property
    def rows(self) -> int:
        """R."""
        return self.scales_ERG.shape[1]

    def decode(self, which: Tensor, out_ERN: Tensor) -> None:
        """Write the matrices `which` [A] in their places of `out_ERN`, in its type."""
        for expert in which.tolist():
            packed, scales = self.packed_ERB[expert], self.scales_ERG[expert]
            zeros = None if self.zeros_ERB is None else self.zeros_ERB[expert]
            if packed.device.type == "cpu":
                points = None if zeros is None else array_of(zeros)
                blob = GridBlob(self.bits, self.width, self.group, array_of(packed), array_of(scales), points)
                out_ERN[expert] = tensor_of(blob.weights())
            else:
                out_ERN[expert] = decoded(packed, scales, zeros, self.bits, self.width, self.group)


def decoded(packed_RB: Tensor, scales_RG: Tensor, zeros_RB: Tensor | None, bits: int, width: int, group: int) -> Tensor:
    """One matrix [R, N] of the scales' type by torch's own functions: (number - zero) * scale in float32, rounded."""
    group_N = torch.arange(width, device=packed_RB.device) // group
    zero_RG = torch.full_like(scales_RG, 1 << bits - 1, dtype=torch.int32)
    if zeros_RB is not None:
        zero_RG = unpacked(zeros_RB, bits, scales_RG.shape[1])
    step_RN = (unpacked(packed_RB, bits, width) - zero_RG[:, group_N]).float()
    return (step_RN * scales_RG.float()[:, group_N]).to(scales_RG.dtype)


def unpacked(packed_RB: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of rows of bytes, int32."""
    bit = torch.arange(count, device=packed_RB.device) * bits
    byte, last = bit // 8, packed_RB.shape[1] - 1
    low, high = packed_RB[:, byte].int(), packed_RB[:, (byte + 1).clamp(max=last)].int()
    return (low | high << 8) >> bit % 8 & (1 << bits) - 1
