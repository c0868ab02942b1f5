"""What quantisers share: what they give, and how errors are told.

G matrices, R rows, N columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moectl.compress.quantise.gptq import Factor
from moectl.errors import InputError
from moectl.integrations.qmoe.arrays import array_of

Piece = dict[str, Tensor]
"""Quantised matrices. The first dimension of every tensor is G, so pieces are put together key by key. All have

    error_G      the sum over inputs of ||(W - Q) x||^2 relative to that of ||W x||^2; of ||W - Q||^2 without inputs
    zeros_G      the share of weights that are zero
    bits_G       bits a weight that storing them takes, scales and levels counted
    factor_G     levels as multiples of the root mean square of a row; 0 where they follow from extremes
    fallback_G   the Hessian could not be factored as it was
"""


ROWS = 256
"""Rows of all matrices that are worked on at once: they are independent, and what is in memory for each is much."""


LARGEST = 1e15
"""Squares of larger weights, added up, leave float32: all would become zeros, and the error be told as 0."""


def check_finite(weight_GRN: Tensor, hessian_GNN: Tensor | None) -> None:
    """Refuse what cannot be quantised.

    Raises:
        ValueError: a weight or a Hessian is not finite: the matrix is named by its index in the batch.
        InputError: a weight is beyond `LARGEST`, as named.
    """
    for what, tensor in (("a weight", weight_GRN), ("a second moment of the inputs", hessian_GNN)):
        if tensor is not None:
            for index, matrix in enumerate(tensor):
                if not matrix.sum().isfinite() and not matrix.isfinite().all():
                    raise ValueError(f"{what} of matrix {index} is not finite")
    for index, matrix in enumerate(weight_GRN):
        largest = max(map(abs, torch.stack(matrix.aminmax()).tolist()))
        if largest > LARGEST:
            raise InputError(
                f"Matrix {index} of those that are quantised together has a weight of {largest:.3g}.",
                f"Beyond {LARGEST:g} errors cannot be calculated, and no model that was trained has such weights.",
                "Mend the weights.",
            )


def energy(factored: Factor, through_GNR: Tensor, weight_GNR: Tensor) -> Tensor:
    """What each row of W, or of W - Q, makes of the inputs, squared and added up, [G, R]. Damping is taken out again.

    Args:
        factored: the Hessians.
        through_GNR: W (1 + F).
        weight_GNR: W.
    """
    return factored.inner(through_GNR, through_GNR) - factored.damping_G[:, None] * weight_GNR.square().sum(1)


def relative_error(lost_GR: Tensor, whole_GR: Tensor) -> Tensor:
    """`error_G` from the energies of rows; 0 where nothing was there to get wrong."""
    lost_G, whole_G = (part_GR.double().sum(1) for part_GR in (lost_GR, whole_GR))
    return torch.where(whole_G > 0, lost_G.clamp(min=0) / whole_G, 0).to(lost_GR.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, bfloat16 too, row by row in memory."""
    return array_of(tensor.contiguous())
