"""The expert layer backward on a CPU, from x and the saved up-projection h.

With dy the gradient to y, by place s of expert e, token t and routing weight w:

    da = dy_t W_down          dw = da . a (+ dy_t . b_down)       dh = activation'(h)[w da]
    dW_down = dy_t^T (w a)    dW_up = dh^T x_t                    dx_t = sum over the token's places of dh W_up

so the experts' outputs are not needed again (arXiv 2512.14080, section 4).

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k,
S = T*K routed rows, n rows of one run of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activations import Activation
from moe_kernels.cpu.layer import SINGLE_ROWS, Grouping
from moe_kernels.cpu.products import Matrices, clear_idle, outer_products, sizes
from moe_kernels.dispatch import Dispatch


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_SG: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    weight_TK: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    plan: Dispatch,
    activation: Activation,
    interleaved: bool,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients to x, gate_up, down, the routing weights, and the two biases.

    `needs` says whether those to x, to gate_up with its bias, and to down with its bias are wanted; what is not, or has
    no bias, is None.
    """
    grouping = Grouping.from_dispatch(plan)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    few = grouping.rows <= SINGLE_ROWS
    up, down = Matrices(gate_up_EGD.mT, few=few), Matrices(down_EDF.mT, few=few)
    dgate_up, ddown = (
        torch.empty_like(weight) if need else None
        for weight, need in zip((gate_up_EGD, down_EDF), needs[1:], strict=True)
    )
    dgate_up_bias, ddown_bias = (
        torch.zeros_like(bias) if need and bias is not None else None
        for bias, need in zip((gate_up_bias_EG, down_bias_ED), needs[1:], strict=True)
    )
    dx_SD = x_TD.new_empty(grouping.rows if needs[0] else 0, x_TD.shape[1])
    dx_SD[grouping.bounds[-1] :] = 0
    weight_S = weight_TK.reshape(-1)[grouping.row].to(wide)
    dweight_S = torch.zeros_like(weight_S)
    token_S = grouping.token
    for first, counts, start, end in grouping.runs():
        place, experts = slice(start, end), slice(first, first + len(counts))
        x_nD, dy_nD = x_TD.index_select(0, token_S[place]), dy_TD.index_select(0, token_S[place])
        weight_n1 = weight_S[place, None]
        da_nF = x_TD.new_empty(end - start, down.outputs)
        down.products(first, counts, dy_nD, da_nF)
        # Everything between two products is in float32, and rounded once.
        h_nG, da_nF = h_SG[place].to(wide), da_nF.to(wide)
        a_nF = activation(h_nG, interleaved)
        dweight_S[place] = (da_nF * a_nF).sum(-1)
        dh_nG = activation.backward(h_nG, da_nF.mul_(weight_n1), interleaved).to(x_TD.dtype)
        if ddown is not None:
            outer_products(first, counts, dy_nD, a_nF.mul_(weight_n1).to(x_TD.dtype), ddown)
        if dgate_up is not None:
            outer_products(first, counts, dh_nG, x_nD, dgate_up)
        if needs[0]:
            up.products(first, counts, dh_nG, dx_SD[place])
        if gate_up_bias_EG is None and down_bias_ED is None:
            continue
        expert_n = torch.repeat_interleave(torch.arange(first, experts.stop), torch.tensor(counts))
        dy_wide = dy_nD.to(wide)
        if down_bias_ED is not None:
            dweight_S[place] += (dy_wide * down_bias_ED[expert_n]).sum(-1)
        if ddown_bias is not None:
            ddown_bias[experts] = _sum_by_expert(dy_wide * weight_n1, expert_n - first, len(counts))
        if dgate_up_bias is not None:
            dgate_up_bias[experts] = _sum_by_expert(dh_nG.to(wide), expert_n - first, len(counts))
    for gradient in (dgate_up, ddown):
        if gradient is not None:
            clear_idle(gradient, sizes(grouping.bounds))
    dweight = torch.empty_like(dweight_S)
    dweight[grouping.row] = dweight_S
    dx_TD = grouping.combine(dx_SD, None) if needs[0] else None
    return dx_TD, dgate_up, ddown, dweight.view_as(weight_TK).to(weight_TK.dtype), dgate_up_bias, ddown_bias


def _sum_by_expert(rows_nD: Tensor, expert_n: Tensor, experts: int) -> Tensor:
    return rows_nD.new_zeros(experts, rows_nD.shape[1]).index_add_(0, expert_n, rows_nD)
