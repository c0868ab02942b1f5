"""`expert_mlp`: the expert layer, on whatever device its tensors are, with gradients.

A known activation takes the fused path: one call forward and one backward. Any other function, or a norm on the
experts' outputs, takes the composed one: grouped product, function, grouped product, norm, combine, each
differentiable. Under torch.compile the calls are opaque operators, so nothing of them is traced and nothing breaks the
graph.

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k,
S = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import cpu, target
from moe_kernels.activations import SWIGLU, Activation
from moe_kernels.dispatch import SMALLEST_BLOCK, Dispatch
from moe_kernels.grouped import block_of, composed


def expert_mlp(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    activation: Activation | Callable[[Tensor], Tensor] = SWIGLU,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    post_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y_t = sum_k weight_tk * down_e a(gate_up_e x_t + b_e) with e = index_tk (arXiv 2401.04088, section 2.1).

    Differentiable in everything that is floating. Sums are in float32 (float64 for float64) and rounded once; the
    same input gives the same bits on every run.

    Args:
        x_TD: tokens [T, D]; computed with in the type of the matrices, or in autocast's where they are float32.
        gate_up: up-projections [E, G, D], gate rows first; `interleaved`: gate and up rows alternate.
        down: down-projections [E, D, F].
        index_TK: chosen experts [T, K], integers; an id outside 0..E-1 is another rank's and adds nothing, also to
            gradients.
        weight_TK: what each choice counts for [T, K], in any floating type.
        activation: an Activation, or any function from [n, G] to [n, F] (it sees rows as they are stored).
        gate_up_bias, down_bias: [E, G] and [E, D], or None.
        transposed: the matrices are [E, D, G] and [E, F, D].
        post_norm: applied to the experts' output rows [n, D] before they are weighted.

    Returns:
        [T, D] in the type of `x_TD`.

    Raises:
        ImportError: the tensors are on a GPU and Triton is not installed.
        ValueError: they are on a GPU and float64.
    """
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    dtype, kind = gate_up.dtype, x_TD.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (gate_up_bias, down_bias))
    x = x_TD if x_TD.dtype == dtype else x_TD.to(dtype)
    if not isinstance(activation, Activation) or post_norm is not None:
        return composed(
            x, gate_up, down, index_TK, weight_TK, activation, gate_up_bias, down_bias, interleaved, post_norm
        ).to(x_TD.dtype)  # fmt: skip
    given = (x, gate_up, down, index_TK, weight_TK, gate_up_bias, down_bias)
    learning = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    if torch.compiler.is_compiling():
        y = _operator(*given, *_said(activation), interleaved, learning)[0]
    elif learning:
        y = _Experts.apply(*given, activation, interleaved)
    else:
        y = implementation(x).forward(*given, activation, interleaved, False)[0]
    return y if y.dtype == x_TD.dtype else y.to(x_TD.dtype)


def _said(activation: Activation) -> tuple[str, bool, float | None, float, float]:
    """An activation as an operator's arguments."""
    return activation.kind, activation.gated, activation.limit, activation.alpha, activation.offset


def implementation(x: Tensor) -> Any:
    """The module whose `forward` and `backward` serve this tensor's device."""
    if target.uses_triton(x):
        from moe_kernels.gpu import experts

        return experts
    return cpu


def forward(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    gated: bool,
    limit: float | None,
    alpha: float,
    offset: float,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and for the backward pass h and the tensors of the dispatch (all empty without `save`)."""
    activation = Activation(kind, gated, limit, alpha, offset)
    y, h, plan = implementation(x_TD).forward(
        x_TD, gate_up, down, index_TK, weight_TK, gate_up_bias, down_bias, activation, interleaved, save
    )
    if not save:
        none = index_TK.new_empty(0, dtype=torch.int32)
        return (y, y.new_empty(0, 0), none, none.clone(), none.clone(), none.new_empty(0, 2), none.clone())
    return y, h, plan.offsets, plan.row, plan.inverse, plan.schedule, plan.n_blocks


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_SG: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight_TK: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    offsets: Tensor,
    row: Tensor,
    inverse: Tensor,
    schedule: Tensor,
    n_blocks: Tensor,
    kind: str,
    gated: bool,
    limit: float | None,
    alpha: float,
    offset: float,
    interleaved: bool,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, gate_up, down, the routing weights and the biases; empty where none is needed or can be."""
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, weight_TK.shape[1], block_of(x_TD, row, offsets))
    activation = Activation(kind, gated, limit, alpha, offset)
    needs = (need_x, need_gate_up, need_down)
    gradients = implementation(x_TD).backward(
        dy_TD, x_TD, h_SG, gate_up, down, weight_TK, gate_up_bias, down_bias, plan, activation, interleaved, needs
    )
    dx, dgate_up, ddown, dweight, *biases = (x_TD.new_empty(0) if one is None else one for one in gradients)
    return dx, dgate_up, ddown, dweight, biases[0], biases[1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, weight, gate_up_bias, down_bias, *said, _ = inputs
    ctx.save_for_backward(x, gate_up, down, weight, gate_up_bias, down_bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.said = said


def _gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_up, down, weight, gate_up_bias, down_bias, h, *plan = ctx.saved_tensors
    need_x, need_up, need_down, _, _, need_up_bias, need_down_bias, *_ = ctx.needs_input_grad
    needs = (need_x, need_up or need_up_bias, need_down or need_down_bias)
    dx, dgate_up, ddown, dweight, dgate_up_bias, ddown_bias = _backward_operator(
        upstream[0].contiguous(), x, h, gate_up, down, weight, gate_up_bias, down_bias, *plan, *ctx.said, *needs
    )
    weights = (dx if needs[0] else None, dgate_up if needs[1] else None, ddown if needs[2] else None, None, dweight)
    up_bias = dgate_up_bias if needs[1] and gate_up_bias is not None else None
    down_bias_gradient = ddown_bias if needs[2] and down_bias is not None else None
    return (*weights, up_bias, down_bias_gradient, *(None,) * (len(ctx.said) + 1))


class _Experts(torch.autograd.Function):
    """The fused path in eager mode, where an operator's own autograd costs more than a small kernel.

    `setup_context` would say it more shortly and cost 60 microseconds a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        index: Tensor,
        weight: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: Activation,
        interleaved: bool,
    ) -> Tensor:
        """y, keeping what the backward pass needs."""
        y, h, plan = implementation(x).forward(
            x, gate_up, down, index, weight, gate_up_bias, down_bias, activation, interleaved, True
        )
        ctx.save_for_backward(
            x, gate_up, down, weight, gate_up_bias, down_bias,
            h, plan.offsets, plan.row, plan.inverse, plan.schedule, plan.n_blocks,
        )  # fmt: skip
        ctx.said = (*_said(activation), interleaved)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to all of forward's arguments."""
        return (*_gradients(ctx, *upstream)[:7], None, None)


_operator = torch.library.custom_op("moe_kernels::experts", forward, mutates_args=())
_operator.register_autograd(_gradients, setup_context=_keep)
_backward_operator = torch.library.custom_op("moe_kernels::experts_backward", backward, mutates_args=())


@_operator.register_fake
def _(x_TD: Tensor, gate_up: Tensor, down: Tensor, index_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, experts = (index_TK.numel(), len(gate_up)) if rest[-1] else (0, -1)

    def integers(*shape: Any) -> Tensor:
        return index_TK.new_empty(shape, dtype=torch.int32)

    h = x_TD.new_empty(rows, gate_up.shape[1] if rest[-1] else 0)
    lines = (experts + rows // SMALLEST_BLOCK, 1) if rest[-1] and target.uses_triton(x_TD) else (0, 0)
    plan = integers(experts + 1), integers(rows), integers(rows), integers(lines[0], 2), integers(lines[1])
    return (x_TD.new_empty(x_TD.shape), h, *plan)


@_backward_operator.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, h_SG: Tensor, gate_up: Tensor, down: Tensor, weight_TK: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_up, need_down = rest[-3:]

    def like(tensor: Tensor | None, needed: bool, **options: Any) -> Tensor:
        return torch.empty_like(tensor, **options) if needed and tensor is not None else x_TD.new_empty(0)

    dx = like(x_TD, need_x, memory_format=torch.contiguous_format)
    dweight = like(weight_TK, True, memory_format=torch.contiguous_format)
    biases = like(gate_up_bias, need_up), like(down_bias, need_down)
    return (dx, like(gate_up, need_up), like(down, need_down), dweight, *biases)
