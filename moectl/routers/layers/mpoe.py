"""MPOE (arXiv 2203.01104): experts as matrix product operators that share their central tensor.

Legend: D hidden, F width, E experts, T tokens; of the n-th tensor: A bond to the left, I and O its shares of the
matrix's rows and columns, Z bond to the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moectl.routers.layers.parts import mixed
from moectl.routers.protocol import Context, Router


def factored(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], bond: int = 0) -> list[Tensor]:
    """The matrix product operator of a matrix [prod(rows), prod(columns)]: tensors [A, I, O, Z], by repeated SVD.

    Args:
        matrix: to be written as a product.
        rows: I of each tensor.
        columns: O of each tensor.
        bond: the largest A and Z; 0: as large as it takes to be exact.
    """
    number = len(rows)
    order = [axis for each in range(number) for axis in (each, number + each)]
    rest, left, tensors = matrix.reshape(*rows, *columns).permute(order), 1, []
    for row, column in zip(rows[:-1], columns[:-1], strict=True):
        u, s, v = torch.linalg.svd(rest.reshape(left * row * column, -1), full_matrices=False)
        right = min(len(s), bond or len(s))
        tensors.append(u[:, :right].reshape(left, row, column, right))
        rest, left = s[:right, None] * v[:right], right
    return [*tensors, rest.reshape(left, rows[-1], columns[-1], 1)]


def multiplied(tensors: Sequence[Tensor]) -> Tensor:
    """The matrix that the tensors are [prod(I), prod(O)]."""
    product_RCZ = tensors[0][0]
    for tensor_AIOZ in tensors[1:]:
        product_RICOZ = torch.einsum("rca,aioz->ricoz", product_RCZ, tensor_AIOZ)
        product_RCZ = product_RICOZ.flatten(2, 3).flatten(0, 1)
    return product_RCZ[..., 0]


class MpoLinear(nn.Module):
    """E matrices that have their central tensor in common, and the others, the auxiliary ones, each its own.

    All begin as the same matrix; the central tensor holds most of the numbers.
    """

    def __init__(
        self, num_experts: int, matrix: Tensor, rows: Sequence[int], columns: Sequence[int], bond: int = 0
    ) -> None:
        super().__init__()
        tensors = factored(matrix, rows, columns, bond)
        self.middle = len(tensors) // 2
        self.central = nn.Parameter(tensors.pop(self.middle))
        self.auxiliary = nn.ParameterList(tensor.expand(num_experts, -1, -1, -1, -1).clone() for tensor in tensors)

    def matrix(self, expert: int, masked: bool = False) -> Tensor:
        """That of an expert; `masked`: without a gradient to the central tensor."""
        tensors = [stack[expert] for stack in self.auxiliary]
        tensors.insert(self.middle, self.central.detach() if masked else self.central)
        return multiplied(tensors)


class MpoExperts(nn.Module):
    """A MoE layer: y = sum_k weight_k * W2_e gelu(W1_e x), with W1 and W2 of all experts as `MpoLinear`.

    The central tensors learn from every expert, the auxiliary ones from their own tokens alone. Against that imbalance
    training keeps the gradient from the central tensors in a share of the steps, `mask`.

    Implementations: one is known, the authors' lpyhdzx/MPOE (`mixture_of_experts.py`; the paper's section 3, number
    from memory). It has five tensors in shapes for hidden sizes of 768 and 1024, biases that experts share, and the
    gate of Tensor2Tensor (as `StMoe`); experts begin with the auxiliary tensors of a trained layer. Which tensors learn
    is a list of numbers there, fixed for a run; the mask, and its default, with which central and auxiliary tensors are
    moved about equally often, are from memory.

    Args:
        up_FD: the matrix W1 all experts begin with.
        down_DF: W2.
        hidden_factors: of D; as many as of F, about equal.
        width_factors: of F.
        router: over hidden states.
        bond: as of `factored`.
        mask: probability; negative: 1 - 1 / E.

    Raises:
        ValueError: factors do not multiply to the sizes.
    """

    def __init__(
        self,
        up_FD: Tensor,
        down_DF: Tensor,
        hidden_factors: Sequence[int],
        width_factors: Sequence[int],
        router: Router,
        bond: int = 0,
        mask: float = -1.0,
    ) -> None:
        super().__init__()
        if len(hidden_factors) != len(width_factors) or len(hidden_factors) < 2:
            raise ValueError("there are as many factors of the hidden size as of the width, two at least")
        if (math.prod(width_factors), math.prod(hidden_factors)) != tuple(up_FD.shape):
            raise ValueError(f"{width_factors} and {hidden_factors} do not multiply to {tuple(up_FD.shape)}")
        E = router.num_experts
        self.router, self.mask = router, 1 - 1 / E if mask < 0 else mask
        self.up = MpoLinear(E, up_FD, width_factors, hidden_factors, bond)
        self.down = MpoLinear(E, down_DF, hidden_factors, width_factors, bond)

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], the router's loss)."""
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(x_TD, context)
        masked = context.training and float(torch.rand((), generator=context.generator)) < self.mask

        def expert(number: int, x_RD: Tensor) -> Tensor:
            inner_RF = nn.functional.gelu(x_RD @ self.up.matrix(number, masked).T)
            return inner_RF @ self.down.matrix(number, masked).T

        return mixed(x_TD, routing, self.router.num_experts, expert).view_as(x_BLD), routing.aux_loss
