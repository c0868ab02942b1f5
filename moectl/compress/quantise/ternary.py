"""Rows of three values: zero, a level for - and a level for +, found by GPTQ.

G matrices, R rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.codecs import blob
from moectl.codecs.tables import QMOE
from moectl.compress.quantise.gptq import Factor, factor, identity, sweep
from moectl.compress.quantise.levels import of_the_paper, spread
from moectl.compress.quantise.piece import ROWS, Piece, check_finite, energy, relative_error, to_numpy
from moectl.compress.quantise.rate import USUAL, bits, check_possible, meet, usual_bits
from moectl.compress.quantise.refit import refit, stretch


@dataclass(frozen=True, slots=True)
class Ternary:
    """GPTQ to a grid of three values in each row.

    Attributes:
        bits: of a weight, all counted; None for `usual_bits`, but with `compat` or `means` for the thresholds of the
            paper, at what that takes.
        compat: the paper's levels as well, found before GPTQ and kept.
        symmetric: + and - have the same level, as an export to `w2a16` needs it.
        means: levels start as means of what is beyond the paper's thresholds.
        stretched: levels are those of least error, times what keeps the energy of outputs; not with `compat`.
        code: `tunstall` or `qmoe`.
        dtype: of levels.
        damping: relative to the mean of a Hessian's diagonal.
    """

    bits: float | None
    compat: bool
    symmetric: bool
    means: bool
    stretched: bool
    code: str
    dtype: torch.dtype
    damping: float

    def quantise(self, weight_GRN: Tensor, hessian_GNN: Tensor | None, counted_G: Tensor | None = None) -> Piece:
        """See `Method.quantise`."""
        check_finite(weight_GRN, hessian_GNN)
        factored = identity(weight_GRN) if hessian_GNN is None else factor(hessian_GNN, self.damping)
        target = self._target(weight_GRN.shape[2])
        if target is None:
            found = self._quantised(weight_GRN, factored, None)
        else:

            def rate(rows_GRN: Tensor, times_G: Tensor) -> Tensor:
                rounded_GNR, *_ = self._swept(rows_GRN, factored, times_G)
                return bits(rounded_GNR.sign().to(torch.int8).mT, self.code, self.dtype)

            found = meet(target, weight_GRN, rate, lambda times_G: self._quantised(weight_GRN, factored, times_G))
        return found | {"fallback_G": factored.fallback_G}

    def _target(self, width: int) -> float | None:
        """Bits a weight in rows of so many; None where thresholds are the paper's."""
        if self.bits is not None:
            check_possible(self.bits, width, self.code, self.dtype)
            return self.bits
        return None if self.compat or self.means else usual_bits(width, self.dtype)

    def _quantised(self, weight_GRN: Tensor, factored: Factor, times_G: Tensor | None) -> Piece:
        """All of a piece but what does not depend on where levels are."""
        parts = [self._rows(rows_GRN, factored, times_G) for rows_GRN in weight_GRN.split(ROWS, 1)]
        trits_GRN, levels_GR2, lost_GR, whole_GR = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return {
            "trits_GRN": trits_GRN,
            "levels_GR2": levels_GR2,
            "error_G": relative_error(lost_GR, whole_GR),
            "zeros_G": (trits_GRN == 0).flatten(1).to(weight_GRN.dtype).mean(1),
            "bits_G": bits(trits_GRN, self.code, self.dtype),
            "factor_G": weight_GRN.new_zeros(len(weight_GRN)) if times_G is None else times_G,
        }

    def _rows(self, weight_GRN: Tensor, factored: Factor, times_G: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and levels of some rows, and the energies of what is lost and of the rows."""
        weight_GNR = weight_GRN.mT.contiguous()
        rounded_GNR, off_GNR, levels_GR2 = self._swept(weight_GRN, factored, times_G)
        through_GNR, trits_GNR = factored.through(weight_GNR), rounded_GNR.sign()
        if not self.compat:
            levels_GR2, off_GNR = refit(
                factored, through_GNR, trits_GNR, levels_GR2, off_GNR, self.dtype, symmetric=self.symmetric
            )
        if self.stretched:
            levels_GR2, off_GNR = stretch(factored, through_GNR, trits_GNR, levels_GR2, off_GNR, self.dtype)
        lost_GNR = weight_GNR - _values(trits_GNR, levels_GR2[:, None])
        energies = energy(factored, off_GNR, lost_GNR), energy(factored, through_GNR, weight_GNR)
        return trits_GNR.to(torch.int8).mT.contiguous(), levels_GR2.to(self.dtype), *energies

    def _swept(self, weight_GRN: Tensor, factored: Factor, times_G: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What rows become, what they are off by, and levels."""
        if times_G is None:
            levels = of_the_paper(weight_GRN, self.dtype, means=self.means, symmetric=self.symmetric)
        else:
            levels = spread(weight_GRN, times_G, self.dtype)
        swept = sweep(weight_GRN.mT.contiguous(), factored, lambda target_GR, _column: levels.value(target_GR))
        return *swept, levels.values_GR2

    def dense(self, piece: Piece) -> Tensor:
        """See `Method.dense`."""
        return _values(piece["trits_GRN"], piece["levels_GR2"].float()[:, :, None])

    def store(self, name: str, piece: Piece, *, transposed: bool, stacked: bool) -> dict[str, np.ndarray]:
        """See `Method.store`."""
        trits, levels = (
            to_numpy(piece[key] if stacked else piece[key].squeeze(0)) for key in ("trits_GRN", "levels_GR2")
        )
        number = QMOE if self.code == "qmoe" else None
        return blob.pack(trits, levels, name, number, transposed=transposed).tensors()

    def to_json(self) -> dict[str, Any]:
        """See `Method.to_json`."""
        return {
            "method": "ternary",
            "bits": self.bits,
            "usual": None if self.bits or self.compat or self.means else USUAL,
            "compat": self.compat,
            "symmetric": self.symmetric,
            "means": self.means,
            "stretched": self.stretched,
            "code": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "damping": self.damping,
        }


def _values(trits: Tensor, levels: Tensor) -> Tensor:
    """What codes stand for; the last dimension of `levels`, [..., 2], is that of the two levels."""
    low, high = levels.unbind(-1)
    return torch.where(trits > 0, high, torch.where(trits < 0, low, 0))
