"""Uniform grids of 2, 3 or 4 bits, with a scale and a zero for each group of a row, found by GPTQ.

G matrices, R rows, N columns, S groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.codecs import grid
from moectl.compress.quantise.gptq import Factor, factor, identity, strength, sweep
from moectl.compress.quantise.piece import ROWS, Piece, check_finite, energy, relative_error, to_numpy
from moectl.compress.quantise.scales import number, ranges


@dataclass(frozen=True, slots=True)
class Grid:
    """GPTQ to a uniform grid in each group of a row. Columns are swept from the strongest input down.

    Attributes:
        bits: 2, 3 or 4.
        group_size: weights of a group; -1 for a whole row.
        symmetric: the number 2^(bits - 1) is zero everywhere.
        dtype: of scales, and of what is decoded.
        damping: relative to the mean of a Hessian's diagonal.
    """

    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    damping: float

    def quantise(self, weight_GRN: Tensor, hessian_GNN: Tensor | None, counted_G: Tensor | None = None) -> Piece:
        """See `Method.quantise`."""
        check_finite(weight_GRN, hessian_GNN)
        count, _, width = weight_GRN.shape
        plain = identity(weight_GRN)
        strength_GN = plain.pivot_GN if hessian_GNN is None else strength(hessian_GNN, self.damping)
        order_GN = strength_GN.argsort(dim=1, descending=True, stable=True)
        factored = plain if hessian_GNN is None else factor(hessian_GNN, self.damping, order_GN)
        parts = [self._rows(rows_GRN, factored, order_GN) for rows_GRN in weight_GRN.split(ROWS, 1)]
        numbers_GRN, scales_GRS, points_GRS, zeros_GR, lost_GR, whole_GR = (
            torch.cat(part, 1) for part in zip(*parts, strict=True)
        )
        return {
            "numbers_GRN": numbers_GRN,
            "scales_GRS": scales_GRS,
            "points_GRS": points_GRS,
            "error_G": relative_error(lost_GR, whole_GR),
            "zeros_G": zeros_GR.mean(1),
            "bits_G": weight_GRN.new_full((count,), self._bits(width)),
            "factor_G": weight_GRN.new_zeros(count),
            "fallback_G": factored.fallback_G,
        }

    def _rows(self, weight_GRN: Tensor, factored: Factor, order_GN: Tensor) -> tuple[Tensor, ...]:
        """Numbers, scales, points and shares of zeros of some rows, and energies of what is lost and of the rows."""
        count, rows, width = weight_GRN.shape
        group = self._group(width)
        scale_GRS, point_GRS = ranges(weight_GRN, self.bits, group, self.symmetric, self.dtype)
        scale_GSR, point_GSR = scale_GRS.mT.contiguous(), point_GRS.mT.contiguous()
        each_G, group_GN = torch.arange(count, device=order_GN.device), order_GN // group

        def to_value(target_GR: Tensor, column: int) -> Tensor:
            scale_GR, point_GR = (group_GSR[each_G, group_GN[:, column]] for group_GSR in (scale_GSR, point_GSR))
            return self._value(number(target_GR, scale_GR, point_GR, self.bits), scale_GR, point_GR)

        order_GNR = order_GN[..., None].expand(-1, -1, rows)
        weight_GNR = weight_GRN.mT.gather(1, order_GNR)
        rounded_GNR, off_GNR = sweep(weight_GNR, factored, to_value)
        lost_GR = energy(factored, off_GNR, weight_GNR - rounded_GNR)
        whole_GR = energy(factored, factored.through(weight_GNR), weight_GNR)
        dense_GRN = torch.empty_like(rounded_GNR).scatter_(1, order_GNR, rounded_GNR).mT
        scale_GRN, point_GRN = (self._by_column(per_group, width) for per_group in (scale_GRS, point_GRS))
        return (
            number(dense_GRN, scale_GRN, point_GRN, self.bits).to(torch.uint8).contiguous(),
            scale_GRS.to(self.dtype),
            point_GRS.to(torch.uint8),
            (rounded_GNR == 0).to(weight_GRN.dtype).mean(1),
            lost_GR,
            whole_GR,
        )

    def _bits(self, width: int) -> float:
        groups = -(-width // self._group(width))
        points = 0 if self.symmetric else -(-groups * self.bits // 8)
        return 8 * (-(-width * self.bits // 8) + groups * self.dtype.itemsize + points) / width

    def _group(self, width: int) -> int:
        return width if self.group_size == -1 else self.group_size

    def _by_column(self, per_group_GRS: Tensor, width: int) -> Tensor:
        return per_group_GRS.repeat_interleave(self._group(width), 2)[..., :width]

    def _value(self, numbers: Tensor, scale: Tensor, point: Tensor) -> Tensor:
        return ((numbers - point) * scale).to(self.dtype).to(scale.dtype)

    def dense(self, piece: Piece) -> Tensor:
        """See `Method.dense`."""
        width = piece["numbers_GRN"].shape[-1]
        scale_GRN, point_GRN = (self._by_column(piece[key].float(), width) for key in ("scales_GRS", "points_GRS"))
        return self._value(piece["numbers_GRN"].float(), scale_GRN, point_GRN)

    def store(self, name: str, piece: Piece, *, transposed: bool, stacked: bool) -> dict[str, np.ndarray]:
        """See `Method.store`."""
        keys = ("numbers_GRN", "scales_GRS", "points_GRS")
        numbers, scales, points = (to_numpy(piece[key] if stacked else piece[key].squeeze(0)) for key in keys)
        group = self._group(numbers.shape[-1])
        kept = None if self.symmetric else points
        return grid.pack(numbers, scales, kept, self.bits, group, name, transposed=transposed).tensors()

    def to_json(self) -> dict[str, Any]:
        """See `Method.to_json`."""
        return {
            "method": "grid",
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "dtype": str(self.dtype).removeprefix("torch."),
            "damping": self.damping,
        }
