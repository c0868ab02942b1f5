"""GPTQ (arXiv 2210.17323) for many matrices at once, as in QMoE (arXiv 2310.16795, section 4.2).

    G matrices, R rows (outputs), N columns (inputs)

The columns of a matrix are rounded one after another, and what each is off by is made good by those after it, as well
as inputs with these second moments H allow. GPTQ takes the amounts from the Cholesky factor of the inverse of H. They
are also in a factor of H itself (arXiv 2307.13304, theorem 6), H = (1 + F) D (1 + F)^T with F strictly upper
triangular: column j is to be rounded at w_j + sum_k<j (w_k - q_k) F_kj, and what it is then off by counts D_j times its
square. That is one factorisation instead of two and an inverse, and asks less of the condition of H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RAISED = (1.0, 10.0, 100.0)
"""What damping is multiplied by, one after another, until a Hessian can be factored."""

LEAST_RAISED = 0.01
"""The least damping that is multiplied by more than 1."""

PRODUCT_COLUMNS = 256
"""Columns of a block in a product with F, whose zeros below the diagonal are left out block by block."""

ToValue = Callable[[Tensor, int], Tensor]
"""What the weights of a column, [G, R], become; and which column, counted as they are swept."""


@dataclass(frozen=True, slots=True)
class Factor:
    """H + damping = (1 + F) D (1 + F)^T, for H scaled to a mean of 1 on its diagonal.

    Attributes:
        feedback_GNN: F, strictly upper triangular; None where it is 0 for all.
        pivot_GN: D.
        damping_G: what was added, 0 where the identity stands for H.
        fallback_G: H could not be factored with the damping that was asked for: more was taken or, where that did not
            help either, the identity in its place.
    """

    feedback_GNN: Tensor | None
    pivot_GN: Tensor
    damping_G: Tensor
    fallback_G: Tensor

    def through(self, weight_GNR: Tensor) -> Tensor:
        """W (1 + F), with columns first as in `sweep`."""
        product_GNR = weight_GNR.clone()
        if self.feedback_GNN is not None:
            for start in range(0, weight_GNR.shape[1], PRODUCT_COLUMNS):
                stop = start + PRODUCT_COLUMNS
                feedback = self.feedback_GNN[:, :stop, start:stop].mT
                product_GNR[:, start:stop].baddbmm_(feedback, weight_GNR[:, :stop])
        return product_GNR

    def inner(self, one_GNR: Tensor, other_GNR: Tensor) -> Tensor:
        """The sum over D of products of what went through, [G, R]: of damped errors if they are errors."""
        return torch.einsum("gn,gnr->gr", self.pivot_GN, one_GNR * other_GNR)


def strength(hessian_GNN: Tensor, damping: float) -> Tensor:
    """What each input adds to errors by itself, [G, N]: the diagonal of H + damping, H scaled as for `Factor`."""
    square_GN = hessian_GNN.diagonal(dim1=1, dim2=2)
    mean_G1 = square_GN.double().mean(1, keepdim=True).to(square_GN.dtype)
    return torch.where(mean_G1 > 0, square_GN / mean_G1 + damping, 1)


def identity(weight_GRN: Tensor) -> Factor:
    """The factor without Hessians: columns know nothing of one another."""
    plain_G = weight_GRN.new_zeros(len(weight_GRN))
    return Factor(None, torch.ones_like(weight_GRN[:, 0]), plain_G, plain_G.bool())


def factor(hessian_GNN: Tensor, damping: float, order_GN: Tensor | None = None) -> Factor:
    """Factor Hessians, one after another, so that the result does not depend on what else is in the batch.

    Args:
        hessian_GNN: symmetric, positive semidefinite, of any scale. One of nothing but zeros counts as the identity.
        damping: what is added to the diagonal, relative to its mean.
        order_GN: in which order columns are swept, if not as they are.
    """
    feedback_GNN = torch.empty_like(hessian_GNN)
    pivot_GN = torch.empty_like(hessian_GNN[:, 0])
    added, fallback = [], []
    for index, (feedback_NN, pivot_N) in enumerate(zip(feedback_GNN, pivot_GN, strict=True)):
        hessian_NN = hessian_GNN[index]
        if order_GN is not None:
            hessian_NN = hessian_NN[order_GN[index, :, None], order_GN[index]]
        upper_NN, extra, raised = _upper(hessian_NN, damping)
        root_N = upper_NN.diagonal()
        torch.div(upper_NN, root_N, out=feedback_NN)
        feedback_NN.fill_diagonal_(0)
        torch.square(root_N, out=pivot_N)
        added.append(extra)
        fallback.append(raised)
    return Factor(feedback_GNN, pivot_GN, pivot_GN.new_tensor(added), torch.tensor(fallback, device=hessian_GNN.device))


def _upper(hessian_NN: Tensor, damping: float) -> tuple[Tensor, float, bool]:
    """The upper triangular U of U U^T = H + damping, what was added, and whether that is not what was asked for."""
    mean = hessian_NN.diagonal().mean()
    if mean > 0:
        for times in RAISED:
            extra = damping if times == 1 else times * max(damping, LEAST_RAISED)
            damped_NN = hessian_NN.flip(0, 1).div_(mean)
            damped_NN.diagonal().add_(extra)
            lower_NN, info = torch.linalg.cholesky_ex(damped_NN)
            if info == 0 and lower_NN.diagonal().isfinite().all():
                return lower_NN.flip(0, 1), extra, times > 1
    return torch.eye(len(hessian_NN), dtype=hessian_NN.dtype, device=hessian_NN.device), 0.0, bool(mean > 0)


def sweep(weight_GNR: Tensor, factored: Factor, to_value: ToValue) -> tuple[Tensor, Tensor]:
    """Round all columns, each after those before it have been rounded and made good for.

    Columns are taken in halves, halves of halves and so on, so that nearly all the work is products of matrices.

    Args:
        weight_GNR: matrices, transposed so that a column is contiguous.
        factored: their Hessians.
        to_value: how to round a column.

    Returns:
        What the weights became, [G, N, R], and what each was off by when it was rounded: (W - Q) (1 + F).
    """
    target_GNR, rounded_GNR, lost_GNR = weight_GNR.clone(), torch.empty_like(weight_GNR), torch.empty_like(weight_GNR)

    for start, middle, stop in _halves(0, weight_GNR.shape[1]):
        if start == middle:
            rounded_GNR[:, start] = to_value(target_GNR[:, start], start)
            torch.sub(weight_GNR[:, start], rounded_GNR[:, start], out=lost_GNR[:, start])
        elif factored.feedback_GNN is not None:
            feedback = factored.feedback_GNN[:, start:middle, middle:stop].mT
            target_GNR[:, middle:stop].baddbmm_(feedback, lost_GNR[:, start:middle])
    return rounded_GNR, target_GNR.sub_(rounded_GNR)


def _halves(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """A column to round, (j, j, j + 1), or a half before `middle` to be made good for in that after it, in order.

    A function outside: one that called itself from inside would keep the matrices until garbage is collected.
    """
    if stop - start == 1:
        yield start, start, stop
        return
    middle = start + (1 << (stop - start - 1).bit_length() - 1)
    yield from _halves(start, middle)
    yield start, middle, stop
    yield from _halves(middle, stop)
