"""The expert layer on a CPU: torch's own matrix products, expert by expert, over rows that are grouped once."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activations import Activation
from moe_kernels.dispatch import Dispatch, dispatch


def forward(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: Activation,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Dispatch]:
    """y [T, D], the up-projection h [S, G] by place (None unless `save`), and the dispatch."""
    plan = dispatch(index_TK, len(gate_up_EGD))
    bounds = plan.offsets.tolist()
    y_TD = torch.zeros_like(x_TD)
    weight_S = weight_TK.reshape(-1)[plan.row].to(x_TD.dtype)
    h_SG = x_TD.new_zeros(plan.row.numel(), gate_up_EGD.shape[1]) if save else None
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        token = plan.token[start:end]
        h = x_TD[token] @ gate_up_EGD[expert].T
        if gate_up_bias_EG is not None:
            h += gate_up_bias_EG[expert]
        if h_SG is not None:
            h_SG[start:end] = h
        out = activation(h, interleaved) @ down_EDF[expert].T
        if down_bias_ED is not None:
            out += down_bias_ED[expert]
        y_TD.index_add_(0, token, out * weight_S[start:end, None])
    return y_TD, h_SG, plan


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients to x, gate_up, down, the routing weights, and the two biases (None where there is none)."""
    bounds = plan.offsets.tolist()
    weight_S = weight_TK.reshape(-1)[plan.row].to(x_TD.dtype)
    dx_TD, dgate_up, ddown = torch.zeros_like(x_TD), torch.zeros_like(gate_up_EGD), torch.zeros_like(down_EDF)
    dgate_up_bias = None if gate_up_bias_EG is None else torch.zeros_like(gate_up_bias_EG)
    ddown_bias = None if down_bias_ED is None else torch.zeros_like(down_bias_ED)
    dweight_S = weight_TK.new_zeros(weight_TK.numel())
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        token, row, weight = plan.token[start:end], plan.row[start:end], weight_S[start:end, None]
        x, dy = x_TD[token], dy_TD[token]
        with torch.enable_grad():
            h = h_SG[start:end].detach().requires_grad_()
            a = activation(h, interleaved)
        da = dy @ down_EDF[expert]
        dweight = (da * a.detach()).sum(-1)
        if down_bias_ED is not None and ddown_bias is not None:
            dweight = dweight + dy @ down_bias_ED[expert]
            ddown_bias[expert] = (weight * dy).sum(0)
        dweight_S[row.long()] = dweight.to(dweight_S.dtype)
        (dh,) = torch.autograd.grad(a, h, weight * da)
        ddown[expert] = dy.T @ (weight * a.detach())
        dgate_up[expert] = dh.T @ x
        if dgate_up_bias is not None:
            dgate_up_bias[expert] = dh.sum(0)
        dx_TD.index_add_(0, token, dh @ gate_up_EGD[expert])
    return dx_TD, dgate_up, ddown, dweight_S.view_as(weight_TK), dgate_up_bias, ddown_bias
