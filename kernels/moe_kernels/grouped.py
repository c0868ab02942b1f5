"""The expert layer in differentiable pieces, for activations and norms that are somebody's own function.

`grouped_linear` multiplies rows that are grouped by expert with that expert's matrix, and `combine` sums a token's
rows. Places that are not in use hold zeros, so that a function of all rows, and its gradient, never meets what was
never written.

Legend: T tokens, D hidden_size, N outputs, K top-k, E experts, S = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import cpu, target
from moe_kernels.activations import Activation
from moe_kernels.dispatch import SMALLEST_BLOCK, Dispatch, dispatch


def composed(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    activation: Activation | Callable[[Tensor], Tensor],
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    interleaved: bool,
    post_norm: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """`expert_mlp` as grouped product, function, grouped product, norm, combine."""
    plan = _dispatch_operator(index_TK, len(gate_up_EGD))
    top_k = index_TK.shape[1]
    h_SG = _linear_operator(x_TD, gate_up_EGD, gate_up_bias_EG, *plan, top_k, True)
    a_SF = activation(h_SG, interleaved) if isinstance(activation, Activation) else activation(h_SG)
    y_SD = _linear_operator(a_SF.to(down_EDF.dtype).contiguous(), down_EDF, down_bias_ED, *plan, top_k, False)
    if post_norm is not None:
        y_SD = post_norm(y_SD).to(y_SD.dtype).contiguous()
    return _combine_operator(y_SD, weight_TK, *plan)


def block_of(x: Tensor, row: Tensor, offsets: Tensor) -> int:
    """The row block that a dispatch of these sizes was made with on this device."""
    return _block(x, len(row), len(offsets) - 1)


def _block(x: Tensor, rows: int, experts: int) -> int:
    if not target.uses_triton(x):
        return 0
    from moe_kernels import tuning

    return tuning.choose(target.of(x), rows, experts).block_m


def _dispatch(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = dispatch(index_TK, num_experts, _block(index_TK, index_TK.numel(), num_experts))
    return plan.offsets, plan.row, plan.inverse, plan.schedule, plan.n_blocks


def _linear(
    x: Tensor, weight_END: Tensor, bias_EN: Tensor | None,
    offsets: Tensor, row: Tensor, inverse: Tensor, schedule: Tensor, n_blocks: Tensor, top_k: int, gather: bool,
) -> Tensor:  # fmt: skip
    """x weight_e^T + bias_e by place [S, N]; x by token [T, D] with `gather`, else by place [S, D]."""
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, top_k, block_of(x, row, offsets))
    if target.uses_triton(x):
        from moe_kernels import tuning
        from moe_kernels.gpu import experts

        line = tuning.choose(target.of(x), len(row), plan.num_experts)
        y, _ = experts.grouped(x, weight_END, plan, line["down"], bias=bias_EN, gather=gather)
        return torch.where(plan.in_use[:, None], y, 0.0)
    y = cpu.grouped_mm(x[plan.token.long()] if gather else x, weight_END, offsets, len(row))
    if bias_EN is not None:
        y += torch.where(plan.in_use[:, None], bias_EN[plan.expert], 0.0)
    return y


def _linear_backward(
    dy_SN: Tensor, x: Tensor, weight_END: Tensor, bias_EN: Tensor | None,
    offsets: Tensor, row: Tensor, inverse: Tensor, schedule: Tensor, n_blocks: Tensor, top_k: int, gather: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, the weight and the bias (empty without one)."""
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, top_k, block_of(x, row, offsets))
    if target.uses_triton(x):
        from moe_kernels import tuning
        from moe_kernels.gpu import experts
        from moe_kernels.gpu.combine import combine

        line = tuning.choose(target.of(x), len(row), plan.num_experts)
        rows, _ = experts.grouped(dy_SN, weight_END.mT, plan, line["dx"])
        dw, dbias = experts.grouped_outer(dy_SN, x, plan, line["dw"], weight_END, bias_EN, gather="b" if gather else "")
        if gather:
            dx = combine(rows, plan, None, torch.empty_like(x, memory_format=torch.contiguous_format))
        else:
            dx = torch.where(plan.in_use[:, None], rows, 0.0)
        return dx, dw, x.new_empty(0) if dbias is None else dbias
    token = plan.token.long()
    rows = cpu.grouped_mm(dy_SN, weight_END.mT, offsets, len(row))
    dw = cpu.grouped_outer(dy_SN, x[token] if gather else x, offsets, weight_END)
    dx = torch.zeros_like(x).index_add_(0, token, rows) if gather else rows
    if bias_EN is None:
        return dx, dw, x.new_empty(0)
    used = torch.where(plan.in_use[:, None], dy_SN, 0.0)
    return dx, dw, torch.zeros_like(bias_EN).index_add_(0, plan.expert, used)


def _combine(
    y_SD: Tensor, weight_TK: Tensor, offsets: Tensor, row: Tensor, inverse: Tensor, schedule: Tensor, n_blocks: Tensor
) -> Tensor:
    """sum_k weight_tk y[place of (t, k)]."""
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, weight_TK.shape[1], 0)
    if target.uses_triton(y_SD):
        from moe_kernels.gpu.combine import combine

        return combine(y_SD, plan, weight_TK.contiguous(), y_SD.new_empty(len(weight_TK), y_SD.shape[1]))
    rows = _by_choice(y_SD, inverse).view(*weight_TK.shape, y_SD.shape[1])
    wide = torch.float64 if y_SD.dtype == torch.float64 else torch.float32
    return torch.einsum("tkd,tk->td", rows.to(wide), weight_TK.to(wide)).to(y_SD.dtype)


def _combine_backward(
    dout_TD: Tensor, y_SD: Tensor, weight_TK: Tensor,
    offsets: Tensor, row: Tensor, inverse: Tensor, schedule: Tensor, n_blocks: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients to the rows and to the weights."""
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, weight_TK.shape[1], 0)
    wide = torch.float64 if y_SD.dtype == torch.float64 else torch.float32
    used = plan.in_use
    source = torch.where(used, row, 0).long()
    dout_SD = dout_TD[source // plan.top_k].to(wide)
    dy = torch.where(used[:, None], dout_SD * weight_TK.reshape(-1)[source, None].to(wide), 0.0)
    share = (dout_SD * y_SD.to(wide)).sum(-1)
    return dy.to(y_SD.dtype), _by_choice(share[:, None], inverse).view_as(weight_TK).to(weight_TK.dtype)


def _by_choice(rows: Tensor, inverse: Tensor) -> Tensor:
    return torch.where((inverse >= 0)[:, None], rows[inverse.clamp(min=0).long()], 0.0)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.said = inputs[8:]


def _linear_gradients(ctx: Any, dy_SN: Tensor) -> tuple[Any, ...]:
    dx, dw, dbias = _linear_backward_operator(dy_SN.contiguous(), *ctx.saved_tensors, *ctx.said)
    return (dx, dw, None if ctx.saved_tensors[2] is None else dbias, *(None,) * 7)


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradients(ctx: Any, dout_TD: Tensor) -> tuple[Any, ...]:
    return (*_combine_backward_operator(dout_TD.contiguous(), *ctx.saved_tensors), *(None,) * 5)


_dispatch_operator = torch.library.custom_op("moe_kernels::dispatch", _dispatch, mutates_args=())
_linear_operator = torch.library.custom_op("moe_kernels::grouped_linear", _linear, mutates_args=())
_linear_backward_operator = torch.library.custom_op(
    "moe_kernels::grouped_linear_backward", _linear_backward, mutates_args=()
)
_combine_operator = torch.library.custom_op("moe_kernels::combine", _combine, mutates_args=())
_combine_backward_operator = torch.library.custom_op(
    "moe_kernels::combine_backward", _combine_backward, mutates_args=()
)
_linear_operator.register_autograd(_linear_gradients, setup_context=_keep_linear)
_combine_operator.register_autograd(_combine_gradients, setup_context=_keep_combine)


@_dispatch_operator.register_fake
def _(index_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    rows = index_TK.numel()
    lines = (num_experts + rows // SMALLEST_BLOCK, 1) if target.uses_triton(index_TK) else (0, 0)
    shapes = ((num_experts + 1,), (rows,), (rows,), (lines[0], 2), (lines[1],))
    return tuple(index_TK.new_empty(shape, dtype=torch.int32) for shape in shapes)


@_linear_operator.register_fake
def _(x: Tensor, weight_END: Tensor, bias_EN: Tensor | None, offsets: Tensor, row: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(len(row), weight_END.shape[1])


@_linear_backward_operator.register_fake
def _(dy_SN: Tensor, x: Tensor, weight_END: Tensor, bias_EN: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dbias = x.new_empty(0) if bias_EN is None else x.new_empty(bias_EN.shape)
    return x.new_empty(x.shape), torch.empty_like(weight_END), dbias


@_combine_operator.register_fake
def _(y_SD: Tensor, weight_TK: Tensor, *rest: Any) -> Tensor:
    return y_SD.new_empty(len(weight_TK), y_SD.shape[1])


@_combine_backward_operator.register_fake
def _(dout_TD: Tensor, y_SD: Tensor, weight_TK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return y_SD.new_empty(y_SD.shape), weight_TK.new_empty(weight_TK.shape)
