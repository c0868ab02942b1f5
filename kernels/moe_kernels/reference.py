"""Expert layers in plain torch: what every kernel is tested against, in any precision up to float64.

Legend: T tokens, D hidden_size, F expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu


def expert_mlp(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    activation: Callable[[Tensor], Tensor] = silu,
) -> Tensor:
    """y_t = sum_k weight_tk * down_e (activation(gate_e x_t) * up_e x_t) with e = index_tk (arXiv 2401.04088, 2.1).

    Args:
        x_TD: tokens [T, D].
        gate_up_EGD: gate and up matrices one above the other [E, 2F, D], gate first.
        down_EDF: down matrices [E, D, F].
        index_TK: chosen experts [T, K], integers in 0..E-1; the K of one token are different.
        weight_TK: what each choice counts for [T, K].

    Returns:
        [T, D] in the type of `x_TD`, which is also the type of the computation.
    """
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(gate_up_EGD)):
        token, choice = (index_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ gate_up_EGD[expert].T).chunk(2, dim=-1)
        out = (activation(gate) * up) @ down_EDF[expert].T
        y_TD.index_add_(0, token, weight_TK[token, choice, None].to(out.dtype) * out)
    return y_TD
