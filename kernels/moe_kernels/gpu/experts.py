"""The expert layer by kernels, forward and backward.

    forward   up      a = act(x[token] gate_up^T)    (h kept for backward)      gathers while it loads
              down    y = a down^T
              combine out_t = sum_k weight * y[place]
    backward  dact    dh, weight * a, dweight from dout[token] down             gathers; recomputes a from h
              dw      ddown = dout[token]^T (weight * a);  dgate_up = dh^T x[token]
              dx      rows = dh gate_up
              combine dx_t = sum_k rows[place]

Only x and h outlive the forward pass, and no row of hidden width is kept for each choice (SonicMoE, arXiv 2512.14080).

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k,
S = T*K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moe_kernels import target, tuning
from moe_kernels.activations import Activation
from moe_kernels.dispatch import Dispatch, dispatch
from moe_kernels.gpu import decode, gemm
from moe_kernels.gpu.combine import combine

IDENTITY = Activation("identity", gated=False)


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
) -> tuple[Tensor, Tensor | None, Dispatch | None]:
    """out [T, D], the up-projection h [S, G] by place (None unless `save`), and the dispatch (None if decoding).

    Raises:
        ValueError: the tensors are float64.
    """
    experts, _, hidden = gate_up_EGD.shape
    if x_TD.dtype == torch.float64:
        raise ValueError("float64 experts have no kernels: use moe_kernels.reference, or the CPU")
    if not save and decode.fits(len(index_TK), index_TK.shape[1], experts):
        return decode.forward(
            x_TD, gate_up_EGD, down_EDF, index_TK, weight_TK, gate_up_bias_EG, down_bias_ED, activation, interleaved
        ), None, None  # fmt: skip
    rows = index_TK.numel()
    line = tuning.choose(target.of(x_TD), rows, experts)
    plan = dispatch(index_TK, experts, line.block_m)
    a_SF, h_SG = grouped(
        x_TD, gate_up_EGD, plan, line["up"], bias=gate_up_bias_EG, gather=True, activation=activation,
        interleaved=interleaved, save=save,
    )  # fmt: skip
    y_SD, _ = grouped(a_SF, down_EDF, plan, line["down"], bias=down_bias_ED)
    return combine(y_SD, plan, weight_TK.contiguous(), x_TD.new_empty(len(x_TD), hidden)), h_SG, plan


def backward(
    dout_TD: Tensor,
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
    line = tuning.choose(target.of(x_TD), len(plan.row), plan.num_experts)
    weight = weight_TK.contiguous()
    dh_SG, a_SF, share = activation_gradients(
        dout_TD, h_SG, down_EDF, weight, plan, line["dact"], activation, interleaved
    )
    dx_TD = ddown = ddown_bias = dgate_up = dgate_up_bias = None
    if needs[2]:
        ddown, ddown_bias = grouped_outer(
            dout_TD, a_SF, plan, line["dw"], down_EDF, down_bias_ED, gather="a", weight_TK=weight
        )
    if needs[0]:
        rows_SD, _ = grouped(dh_SG, gate_up_EGD.mT, plan, line["dx"])
        dx_TD = combine(rows_SD, plan, None, torch.empty_like(x_TD, memory_format=torch.contiguous_format))
    if needs[1]:
        dgate_up, dgate_up_bias = grouped_outer(dh_SG, x_TD, plan, line["dw"], gate_up_EGD, gate_up_bias_EG, gather="b")
    dweight_S = share.sum(1)
    if down_bias_ED is not None:
        token = torch.where(plan.in_use, plan.token, 0)
        dweight_S += (dout_TD.float() @ down_bias_ED.float().T)[token, plan.expert]
    dweight = by_choice(dweight_S, plan).view_as(weight_TK).to(weight_TK.dtype)
    return dx_TD, dgate_up, ddown, dweight, dgate_up_bias, ddown_bias


def activation_gradients(
    dout_TD: Tensor,
    h_SG: Tensor,
    down_EDF: Tensor,
    weight_TK: Tensor,
    plan: Dispatch,
    launch: tuning.Launch,
    activation: Activation,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """By place: the gradient to the up-projection [S, G], weight * a [S, F], and that to the routing weight, which is
    the sum over [S, tiles of F].

    `weight_TK` is contiguous. Places that are not in use stay unwritten.
    """
    launch = launch.fitted(h_SG.element_size())
    rows, width = len(plan.row), down_EDF.shape[2]
    tiles = triton.cdiv(width, launch.block_n)
    a_SF, dh_SG = h_SG.new_empty(rows, width), torch.empty_like(h_SG)
    share = torch.empty(rows, tiles, dtype=torch.float32, device=h_SG.device)
    with target.on(h_SG):
        gemm.activation_kernel[(plan.most_blocks * tiles,)](
            dout_TD, down_EDF, h_SG, weight_TK, dh_SG, a_SF, share,
            plan.offsets, plan.row, plan.schedule, plan.n_blocks,
            *dout_TD.stride(), down_EDF.stride(0), down_EDF.stride(2), down_EDF.stride(1),
            width, down_EDF.shape[1], plan.top_k, *halves(width, activation, interleaved),
            *constants(activation), **options(launch, h_SG),
            GROUP_M=launch.group_m, CHUNK=min(32, launch.block_n),
        )  # fmt: skip
    return dh_SG, a_SF, share


def grouped(
    x: Tensor,
    weight_ENK: Tensor,
    plan: Dispatch,
    launch: tuning.Launch,
    *,
    bias: Tensor | None = None,
    gather: bool = False,
    activation: Activation = IDENTITY,
    interleaved: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """a(x weight_e^T + bias_e) for every place [S, F], and what the activation was given [S, N] if `save`.

    `x` is [S, K] by place, or [T, K] by token with `gather`. Places that are not in use stay unwritten.
    """
    launch = launch.fitted(x.element_size())
    rows, width = len(plan.row), activation.width(weight_ENK.shape[1])
    y = x.new_empty(rows, width)
    h = x.new_empty(rows, weight_ENK.shape[1]) if save else None
    grid = (plan.most_blocks * triton.cdiv(width, launch.block_n),)
    with target.on(x):
        gemm.forward_kernel[grid](
            x, weight_ENK, bias, y, h, plan.offsets, plan.row, plan.schedule, plan.n_blocks,
            *x.stride(), *weight_ENK.stride(), *strides(bias),
            width, weight_ENK.shape[2], plan.top_k, *halves(width, activation, interleaved),
            gather, bias is not None, save, *constants(activation), **options(launch, x), GROUP_M=launch.group_m,
        )  # fmt: skip
    return y, h


def grouped_outer(
    a: Tensor,
    b: Tensor,
    plan: Dispatch,
    launch: tuning.Launch,
    weight_ENK: Tensor,
    bias_EN: Tensor | None,
    gather: str = "",
    weight_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sum over each expert's rows of a[n] b[k], laid out like `weight_ENK`; and of a[n] (times the routing weight if
    given).

    `gather` names the operand, "a" or "b", that is by token instead of by place.
    """
    launch = launch.fitted(a.element_size())
    experts, outputs, inputs = weight_ENK.shape
    dw = torch.empty_like(weight_ENK)
    dbias = None if bias_EN is None else torch.empty_like(bias_EN, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(outputs, launch.block_m) * triton.cdiv(inputs, launch.block_n), experts)
    with target.on(a):
        gemm.weight_kernel[grid](
            a, b, dw, dbias, weight_TK, plan.offsets, plan.row, *a.stride(), *b.stride(), *dw.stride(),
            outputs, inputs, plan.top_k, gather == "a", gather == "b", dbias is not None, weight_TK is not None,
            **options(launch, a),
        )  # fmt: skip
    return dw, dbias


def by_choice(value_S: Tensor, plan: Dispatch) -> Tensor:
    """Values by place -> values by row t*K + k; zero for a row that no expert here took."""
    return torch.where(plan.inverse >= 0, value_S[plan.inverse.clamp(min=0)], 0.0)


def halves(width: int, activation: Activation, interleaved: bool) -> tuple[int, int]:
    """STEP and OTHER of the kernels."""
    return (2, 1) if activation.gated and interleaved else (1, width)


def constants(activation: Activation) -> tuple[Any, ...]:
    """KIND, GATED, LIMIT, ALPHA, OFFSET of the kernels."""
    return activation.kind, activation.gated, activation.limit, activation.alpha, activation.offset


def options(launch: tuning.Launch, x: Tensor) -> dict[str, Any]:
    """The tile, the precision of float32 dots, and Triton's own options."""
    precision = target.float32_precision() if x.dtype == torch.float32 else "ieee"
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "PRECISION": precision,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def strides(bias: Tensor | None) -> tuple[int, int]:
    """The strides of a bias [E, N], or zeros."""
    return (0, 0) if bias is None else (bias.stride(0), bias.stride(1))
