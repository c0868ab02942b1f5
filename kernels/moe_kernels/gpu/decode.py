"""The small-batch path: two launches, no dispatch, no atomics, nothing that depends on data but what is loaded.

Where nearly every routed row meets an expert of its own, grouping rows saves no weight traffic and its launches cost
more than the weights. `up` is one matrix-vector product for each row and block of columns; `down` sums a token's
experts in one program, so that nothing is left to combine. With the tensors at fixed addresses both can be captured
in a CUDA graph.

Legend: T tokens, D hidden_size, F expert width, E experts, K top-k, S = T*K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import target
from moe_kernels.activations import Activation
from moe_kernels.gpu.language import activate

MOST_ROWS = 64
MOST_SHARING = 1.25
BUCKETS = (1, 2, 4, 8, 16, 32)
"""Numbers of tokens worth capturing a graph for; a batch is padded to the next with ids of -1, which cost nothing."""


def fits(tokens: int, top_k: int, experts: int) -> bool:
    """Whether a batch is small, and under uniform routing its experts are distinct enough: E (1 - (1 - K/E)^T)."""
    rows = tokens * top_k
    distinct = experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens)
    return rows <= MOST_ROWS and rows <= MOST_SHARING * distinct


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
) -> Tensor:
    """The expert layer for a few tokens [T, D] -> [T, D], without gradients."""
    from moe_kernels.gpu.experts import constants, halves, strides

    tokens, top_k = index_TK.shape
    experts, hidden, width = down_EDF.shape
    index, weight = index_TK.contiguous(), weight_TK.contiguous()
    a_SF = x_TD.new_empty(tokens * top_k, width)
    out_TD = x_TD.new_empty(tokens, hidden)
    along = (8, 512) if gate_up_EGD.stride(2) == 1 else (64, 64)  # whole sectors of memory either way
    block_n, block_k = (16, 64) if target.interpreting() else along
    with target.on(x_TD):
        up_kernel[(tokens * top_k, triton.cdiv(width, block_n))](
            x_TD, gate_up_EGD, gate_up_bias_EG, index, a_SF,
            *x_TD.stride(), *gate_up_EGD.stride(), *strides(gate_up_bias_EG),
            experts, hidden, width, top_k, *halves(width, activation, interleaved), gate_up_bias_EG is not None,
            *constants(activation), block_n, min(block_k, triton.next_power_of_2(hidden)), num_warps=4,
        )  # fmt: skip
        down_kernel[(tokens, triton.cdiv(hidden, block_n))](
            a_SF, down_EDF, down_bias_ED, index, weight, out_TD, *down_EDF.stride(), *strides(down_bias_ED),
            experts, hidden, width, top_k, down_bias_ED is not None,
            block_n, min(block_k, triton.next_power_of_2(width)), num_warps=4,
        )  # fmt: skip
    return out_TD


@triton.jit
def up_kernel(
    x_ptr, w_ptr, bias_ptr, index_ptr, a_ptr,
    stride_xt, stride_xd, stride_we, stride_wg, stride_wd, stride_be, stride_bg,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """a[s, f] for one row s and a block of f; nothing is written for an expert of another rank."""
    s = tl.program_id(0)
    expert = tl.load(index_ptr + s).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = (f < F)[:, None]
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + (s // TOP_K).to(tl.int64) * stride_xt
    w_ptrs = w_ptr + expert * stride_we + (f * STEP).to(tl.int64)[:, None] * stride_wg
    gate = tl.zeros([BLOCK_F], tl.float32)
    up = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + d
        x = tl.load(x_ptrs + column * stride_xd, mask=column < D, other=0.0).to(tl.float32)[None, :]
        mask = rows & (column < D)[None, :]
        at = w_ptrs + column[None, :] * stride_wd
        gate += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32) * x, axis=1)
        if GATED:
            up += tl.sum(tl.load(at + OTHER * stride_wg, mask=mask, other=0.0).to(tl.float32) * x, axis=1)
    if BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + f * STEP * stride_bg
        gate += tl.load(bias_ptrs, mask=f < F, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptrs + OTHER * stride_bg, mask=f < F, other=0.0).to(tl.float32)
    a = activate(gate, up, KIND, GATED, LIMIT, ALPHA, OFFSET)
    tl.store(a_ptr + s * F + f, a.to(a_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def down_kernel(
    a_ptr, w_ptr, bias_ptr, index_ptr, weight_ptr, out_ptr,
    stride_we, stride_wd, stride_wf, stride_be, stride_bd,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[t, d] for one token and a block of d, over the token's experts in the order of its choices."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = (d < D)[:, None]
    f = tl.arange(0, BLOCK_F)
    out = tl.zeros([BLOCK_D], tl.float32)
    for choice in range(TOP_K):
        s = t * TOP_K + choice
        expert = tl.load(index_ptr + s).to(tl.int64)
        if (expert >= 0) & (expert < E):
            y = tl.zeros([BLOCK_D], tl.float32)
            w_ptrs = w_ptr + expert * stride_we + d.to(tl.int64)[:, None] * stride_wd
            for start in range(0, F, BLOCK_F):
                column = start + f
                a = tl.load(a_ptr + s * F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
                w = tl.load(w_ptrs + column[None, :] * stride_wf, mask=rows & (column < F)[None, :], other=0.0)
                y += tl.sum(w.to(tl.float32) * a, axis=1)
            if BIAS:
                y += tl.load(bias_ptr + expert * stride_be + d * stride_bd, mask=d < D, other=0.0).to(tl.float32)
            out += tl.load(weight_ptr + s).to(tl.float32) * y
    tl.store(out_ptr + t * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
