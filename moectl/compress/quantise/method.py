"""What a quantiser is, and which one a number of bits asks for."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moectl.compress.quantise.grid import Grid
from moectl.compress.quantise.piece import Piece
from moectl.compress.quantise.ternary import Ternary
from moectl.errors import UsageError

DAMPING = {"ternary": 0.1, "grid": 0.01}
"""Ternary as in QMoE, grids as in GPTQ: at 4 bits 0.1 cost a small trained model 0.0003 nats a token."""


class Method(Protocol):
    """How a batch of G matrices of R rows (outputs) and N columns (inputs) is quantised and stored."""

    def quantise(self, weight_GRN: Tensor, hessian_GNN: Tensor | None, counted_G: Tensor | None) -> Piece:
        """Quantise matrices.

        Args:
            weight_GRN: float32, on any device.
            hessian_GNN: second moments of the inputs, float32, of any scale; None, or nothing but zeros for one of the
                matrices, rounds to nearest.
            counted_G: tokens that each Hessian is of.

        Raises:
            ValueError: a weight or a Hessian is not finite: the matrix is named by its index in the batch.
            InputError: a weight is beyond `piece.LARGEST`, or the bits cannot be met with matrices of this width.
        """
        ...

    def dense(self, piece: Piece) -> Tensor:
        """The matrices [G, R, N] in float32, exactly as a reader of what is stored decodes them."""
        ...

    def store(self, name: str, piece: Piece, *, transposed: bool, stacked: bool) -> dict[str, np.ndarray]:
        """The tensors of a whole parameter: of G matrices, or where it is not `stacked`, of one without that dimension.

        Args:
            name: of the parameter.
            piece: of all its matrices.
            transposed: the parameter is the transpose of each matrix.
            stacked: it has a dimension for G.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """What was asked for: two that are alike give the same, and do the same."""
        ...


def method(
    bits: float | None,
    *,
    compat: bool = False,
    group_size: int = 128,
    symmetric: bool = False,
    code: str = "tunstall",
    dtype: torch.dtype,
    damping: float | None = None,
    means: bool = False,
    stretched: bool = True,
) -> Method:
    """The quantiser for so many bits.

    Args:
        bits: of a weight, all counted, below 2: ternary, fewer where more do not help; None: ternary, 0.9 bits for the
            code and what rows take, or what the paper's thresholds take. 2, 3 or 4: a uniform grid.
        compat: levels and thresholds of QMoE (arXiv 2310.16795), ternary only.
        group_size: weights that share a scale, -1 for a whole row; uniform grids only.
        symmetric: uniform grids without zero points, ternary rows with one level for both signs.
        code: `tunstall` or the paper's `qmoe`, ternary only.
        dtype: of the parameters in the checkpoint, so of levels and scales.
        damping: what is added to the diagonal of Hessians, relative to its mean; None takes `DAMPING`.
        means: thresholds of QMoE, and levels that start as means of what is beyond them; ternary without bits only.
        stretched: ternary rows keep the energy of their outputs (see `refit.stretch`); otherwise have the least error.

    Raises:
        UsageError: there is no such quantiser.
    """
    if damping is not None and not damping > 0:
        raise UsageError(f"Hessians cannot be damped with {damping:g}.", fix="Use a small number above 0, such as 0.1.")
    if bits is None or 0 < bits < 2:
        if compat and bits is not None:
            raise UsageError(
                "The paper's ternary grid takes the bits it takes.", fix="Leave out --bits or --qmoe-compat."
            )
        return Ternary(
            bits=bits,
            compat=compat,
            symmetric=symmetric,
            means=means,
            stretched=stretched and not compat,
            code=code,
            dtype=dtype,
            damping=DAMPING["ternary"] if damping is None else damping,
        )
    if bits not in (2, 3, 4):
        raise UsageError(
            f"There is no way to quantise to {bits:g} bits.",
            "Below 2 bits weights are ternary, at 2, 3 and 4 they are on a uniform grid.",
            "Use a number below 2, such as 0.8, or 2, 3 or 4.",
        )
    if compat:
        raise UsageError("The paper's grid is ternary.", fix="Leave out --bits or --qmoe-compat.")
    if group_size != -1 and group_size < 1:
        raise UsageError(f"Groups of {group_size} weights are impossible.", fix="Use 1 or more, or -1 for whole rows.")
    return Grid(
        bits=int(bits),
        group_size=group_size,
        symmetric=symmetric,
        dtype=dtype,
        damping=DAMPING["grid"] if damping is None else damping,
    )
