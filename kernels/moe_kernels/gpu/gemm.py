"""Grouped matrix products: rows of one expert against that expert's matrix.

Three kernels. `forward_kernel` is every product with a weight on the way up or down, gathering its rows and applying
the activation as it is told; `activation_kernel` is the first product of the backward pass, with the gradient of the
activation and of the routing weight in its epilogue; `weight_kernel` sums over an expert's rows. Weights come with
strides, so a transposed one is the same code, and so is the transposed product.

The two halves of a gated up-projection are rows n*step and n*step + other of the matrix, and columns of dh: step 1 and
other F for one half after the other, step 2 and other 1 for interleaved rows. h itself always has one half after the
other, for it is written and read whole (interleaved, its stores made the largest tile spill).

Legend: M rows of the block, N columns of the output, K the contraction, all within one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.gpu.language import activate, activate_backward, dot


@triton.jit
def find_tile(
    schedule_ptr, offsets_ptr, n_blocks,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The expert, its block's first place, the rows [BLOCK_M] from there, which are in use, and the column block.

    GROUP_M row blocks take turns at one column block, so that a weight tile is read from the L2 cache by the later
    ones. The caller has made sure that the program id is below n_blocks * tiles: the order below is only right for
    those.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles)
    first = group * GROUP_M
    height = tl.minimum(n_blocks - first, GROUP_M)
    inside = pid % (GROUP_M * tiles)
    block = first + inside % height
    expert = tl.load(schedule_ptr + 2 * block)
    start = tl.load(offsets_ptr + expert) + tl.load(schedule_ptr + 2 * block + 1) * BLOCK_M
    used = start + tl.arange(0, BLOCK_M) < tl.load(offsets_ptr + expert + 1)
    return expert.to(tl.int64), start, tl.where(used, tl.arange(0, BLOCK_M), 0), used, inside // height


@triton.jit
def product(
    acc, acc2, x_ptrs, w_ptrs, other, stride_xk, stride_wk, columns, K: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x [BLOCK_M, K] times w [K, BLOCK_N], and with PAIR acc2 + x times the matrix `other` elements further on.

    Args:
        acc, acc2: what the sums start from, float32 [BLOCK_M, BLOCK_N].
        x_ptrs: pointers to the first column of each row [BLOCK_M, 1].
        w_ptrs: pointers to the first element of each column [1, BLOCK_N].
        columns: which columns exist [1, BLOCK_N].
    """
    k = tl.arange(0, BLOCK_K)
    x_ptrs += k[None, :] * stride_xk
    w_ptrs += k[:, None] * stride_wk
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, mask=columns, other=0.0)
        else:
            inside = start + k < K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & columns, other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if PAIR:
            if K % BLOCK_K == 0:
                w2 = tl.load(w_ptrs + other, mask=columns, other=0.0)
            else:
                w2 = tl.load(w_ptrs + other, mask=(start + k < K)[:, None] & columns, other=0.0)
            acc2 = dot(x, w2, acc2, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    return acc, acc2


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, h_ptr, offsets_ptr, row_ptr, schedule_ptr, n_blocks_ptr,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_be, stride_bn,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr, SAVE: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[place, n] = a(x[row] w_e^T + b_e)[n]; h, the product before the activation, is written with SAVE."""
    n_blocks = tl.load(n_blocks_ptr)
    if tl.program_id(0) >= n_blocks * tl.cdiv(N, BLOCK_N):
        return
    expert, start, m, used, column = find_tile(schedule_ptr, offsets_ptr, n_blocks, N, BLOCK_M, BLOCK_N, GROUP_M)
    source = start + m
    if GATHER:
        source = tl.load(row_ptr + source) // TOP_K
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (n < N)[None, :]
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xm
    w_ptrs = w_ptr + expert * stride_we + (n * STEP).to(tl.int64)[None, :] * stride_wn
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + n * STEP * stride_bn
        gate += tl.load(bias_ptrs, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + OTHER * stride_bn, mask=n < N, other=0.0).to(tl.float32)[None, :]
    gate, up = product(
        gate,
        up,
        x_ptrs,
        w_ptrs,
        OTHER * stride_wn,
        stride_xk,
        stride_wk,
        columns,
        K,
        GATED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )
    mask = used[:, None] & columns
    first = start.to(tl.int64)
    if SAVE:
        width: tl.constexpr = N * (2 if GATED else 1)
        h_ptrs = h_ptr + first * width + (m[:, None] * width + n[None, :])
        tl.store(h_ptrs, gate.to(h_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(h_ptrs + N, up.to(h_ptr.dtype.element_ty), mask=mask)
    y = activate(gate, up, KIND, GATED, LIMIT, ALPHA, OFFSET)
    tl.store(y_ptr + first * N + (m[:, None] * N + n[None, :]), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(
    dy_ptr, w_ptr, h_ptr, weight_ptr, dh_ptr, a_ptr, dweight_ptr, offsets_ptr, row_ptr, schedule_ptr,
    n_blocks_ptr, stride_ym, stride_yk, stride_we, stride_wn, stride_wk,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """With da = dy[token] down_e: dh = weight * a'(h) da, a = weight * a(h), and a share of dweight = <da, a(h)>.

    N is F and K is D here. The shares of dweight are written [S, tiles of N] and summed later, in one order.
    """
    n_blocks = tl.load(n_blocks_ptr)
    if tl.program_id(0) >= n_blocks * tl.cdiv(N, BLOCK_N):
        return
    expert, start, m, used, column = find_tile(schedule_ptr, offsets_ptr, n_blocks, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.load(row_ptr + start + m)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (n < N)[None, :]
    dy_ptrs = dy_ptr + (row // TOP_K).to(tl.int64)[:, None] * stride_ym
    w_ptrs = w_ptr + expert * stride_we + n.to(tl.int64)[None, :] * stride_wn
    share = tl.zeros([BLOCK_M], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    da, _ = product(
        zeros, zeros, dy_ptrs, w_ptrs, 0, stride_yk, stride_wk, columns, K, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    width: tl.constexpr = N * (2 if GATED else 1)
    first = start.to(tl.int64)
    h_ptr += first * width
    dh_ptr += first * width
    a_ptr += first * N
    # The tile goes to where dh will stand and comes back in narrow chunks: with the accumulator and every value of the
    # epilogue alive at once, a tile of 128 x 128 spilled 1.4 kB a thread (sm_90). The way back is through the cache.
    tl.store(
        dh_ptr + (m[:, None] * width + n[None, :] * STEP), da.to(dh_ptr.dtype.element_ty), mask=used[:, None] & columns
    )
    tl.debug_barrier()
    weight = tl.load(weight_ptr + row).to(tl.float32)[:, None]
    for chunk in tl.range(0, BLOCK_N, CHUNK, num_stages=1):
        f = column * BLOCK_N + chunk + tl.arange(0, CHUNK)[None, :]
        mask = used[:, None] & (f < N)
        at = m[:, None] * width + f * STEP
        at_h = m[:, None] * width + f
        dact = tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + at_h, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(h_ptr + N + at_h, mask=mask, other=0.0).to(tl.float32)
        a = activate(gate, up, KIND, GATED, LIMIT, ALPHA, OFFSET)
        share += tl.sum(dact * a, axis=1)
        tl.store(a_ptr + m[:, None] * N + f, (weight * a).to(a_ptr.dtype.element_ty), mask=mask)
        dgate, dup = activate_backward(weight * dact, gate, up, KIND, GATED, LIMIT, ALPHA, OFFSET)
        tl.store(dh_ptr + at, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(dh_ptr + OTHER + at, dup.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + (first + m) * tl.cdiv(N, BLOCK_N) + column, share, mask=used)


@triton.jit
def weight_kernel(
    a_ptr, b_ptr, dw_ptr, bias_ptr, weight_ptr, offsets_ptr, row_ptr,
    stride_am, stride_an, stride_bm, stride_bk, stride_we, stride_wn, stride_wk,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw_e[n, k] = sum over the expert's rows of a[row, n] b[row, k]; zeros for an expert without rows.

    Grid (tiles of N * tiles of K, E). BLOCK_M is the tile of N, BLOCK_N the tile of K, BLOCK_K the rows of a step.
    With BIAS, bias[e, n] = sum of a[row, n], times the routing weight with WEIGHTED.
    """
    expert = tl.program_id(1)
    tiles = tl.cdiv(N, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        used = place < end
        token = place
        if GATHER_A or GATHER_B or WEIGHTED:
            row = tl.load(row_ptr + place, mask=used, other=0)
            token = row // TOP_K
        from_a = (token if GATHER_A else place).to(tl.int64)
        from_b = (token if GATHER_B else place).to(tl.int64)
        a = tl.load(
            a_ptr + from_a[None, :] * stride_am + n[:, None] * stride_an,
            mask=used[None, :] & (n < N)[:, None],
            other=0.0,
        )
        b = tl.load(
            b_ptr + from_b[:, None] * stride_bm + k[None, :] * stride_bk,
            mask=used[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
        if BIAS:
            term = a.to(tl.float32)
            if WEIGHTED:
                term = term * tl.load(weight_ptr + row, mask=used, other=0.0).to(tl.float32)[None, :]
            total += tl.sum(term, axis=1)
    dw_ptrs = dw_ptr + expert.to(tl.int64) * stride_we + n[:, None].to(tl.int64) * stride_wn + k[None, :] * stride_wk
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
    if BIAS:
        if tl.program_id(0) < tiles:
            tl.store(bias_ptr + expert * N + n, total.to(bias_ptr.dtype.element_ty), mask=n < N)
