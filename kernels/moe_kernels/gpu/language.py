"""What the kernels say to Triton in one way: dots that are right in the interpreter too, and the activations.

The interpreter holds bfloat16 as 16-bit integers and multiplies them as such, without a word; so there, and there
alone, operands go to float32 before a dot. Everything but a dot is done in float32 after the load anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.target import interpreting

INTERPRET = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def function(z, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """f of the activation (`Activation.function`)."""
    if KIND == "silu":
        return z * tl.sigmoid(ALPHA * z)
    if KIND == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if KIND == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if KIND == "relu":
        return tl.maximum(z, 0.0)
    if KIND == "relu2":
        return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    return z


@triton.jit
def slope(z, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """The derivative of f."""
    if KIND == "silu":
        s = tl.sigmoid(ALPHA * z)
        return s * (1 + ALPHA * z * (1 - s))
    if KIND == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    if KIND == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if KIND == "relu2":
        return 2 * tl.maximum(z, 0.0)
    return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def activate(
    gate, up, KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr
):
    """The activation in float32; `up` is not looked at where there is no gate."""
    if GATED:
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return function(gate, KIND, ALPHA) * (up + OFFSET)
    return function(gate, KIND, ALPHA)


@triton.jit
def activate_backward(
    da,
    gate,
    up,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The gradients to gate and up from the one to the activation; a clamp passes it on its bounds, as torch's does."""
    if GATED:
        low_gate, low_up = gate, up
        if LIMIT is not None:
            low_gate = tl.minimum(gate, LIMIT)
            low_up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        dgate = da * (low_up + OFFSET) * slope(low_gate, KIND, ALPHA)
        dup = da * function(low_gate, KIND, ALPHA)
        if LIMIT is not None:
            dgate = tl.where(gate <= LIMIT, dgate, 0.0)
            dup = tl.where((up >= -LIMIT) & (up <= LIMIT), dup, 0.0)
        return dgate, dup
    return da * slope(gate, KIND, ALPHA), da
