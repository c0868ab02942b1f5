"""`expert_mlp`: the expert layer, on whatever device its tensors are, with gradients.

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k, S = T*K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import cpu
from moe_kernels.activations import SWIGLU, Activation


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
    """y_t = sum_k weight_tk * down_e a(gate_up_e x_t) with e = index_tk; arguments as `reference.expert_mlp` has them."""
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    out = Experts.apply(
        x_TD.to(gate_up.dtype), gate_up, down, index_TK, weight_TK, gate_up_bias, down_bias, activation, interleaved
    )
    return out.to(x_TD.dtype)


class Experts(torch.autograd.Function):
    """The fused layer: saves x and the up-projection, and recomputes the rest (arXiv 2512.14080)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Run the layer; keep h only where a gradient will be asked for."""
        x, gate_up, down, index, weight, gate_up_bias, down_bias, activation, interleaved = inputs
        y, h, plan = cpu.forward(
            x, gate_up, down, index, weight, gate_up_bias, down_bias, activation, interleaved, any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(x, h, gate_up, down, weight, gate_up_bias, down_bias)
        ctx.rest = plan, activation, interleaved
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients to x, both matrices, the routing weights and the biases."""
        x, h, gate_up, down, weight, gate_up_bias, down_bias = ctx.saved_tensors
        plan, activation, interleaved = ctx.rest
        dx, dgate_up, ddown, dweight, dgate_up_bias, ddown_bias = cpu.backward(
            gradients[0], x, h, gate_up, down, weight, gate_up_bias, down_bias, plan, activation, interleaved
        )
        return dx, dgate_up, ddown, None, dweight, dgate_up_bias, ddown_bias, None, None
