"""Ternary experts on a GPU: codewords multiplied as they are, or decoded into matrices.

A tile is some rows and some codewords of each. Every codeword's entry is fetched at once from the table, which stays in
the L2 cache; a prefix sum over lengths along the row tells where each phrase starts; then slot by slot each lane
gathers the x under its weight. QMoE's kernel (arXiv 2310.16795, section 4.3) walks a row codeword by codeword.

Legend: T tokens, K top-k, S = T*K routed rows, E experts, R rows of a matrix (outputs), N weights in a row (inputs), F
columns of the result, A matrices to decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import target, tuning
from moe_kernels.activations import Activation
from moe_kernels.gpu.experts import IDENTITY, constants, halves, strides
from moe_kernels.gpu.language import activate

if TYPE_CHECKING:
    from moe_kernels.ternary import Call, TernaryExperts

NO_WEIGHT = tl.constexpr(0x00FF_FFFF_FFFF_FF00)


def few(call: Call) -> bool:
    """Whether codewords are multiplied: up to so many rows an expert, by the number that uniform routing would hit."""
    tokens, top_k = call.index_TK.shape
    rows, experts = tokens * top_k, call.up.experts
    distinct = experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens)
    limits = tuning.ternary(target.of(call.x_TD))
    small = rows <= limits.most_rows and rows <= limits.rows_of_an_expert * distinct
    return small and call.up.dtype != torch.float64


def forward(call: Call, activation: Activation) -> Tensor:
    """The layer in three launches [T, D], in float32: up with its activation, down, and the sum over choices."""
    tokens, top_k = call.index_TK.shape
    expert_S = call.index_TK.reshape(-1)
    a_SF = call.x_TD.new_empty(len(expert_S), activation.width(call.up.rows))
    products(
        call.up, call.x_TD, expert_S, a_SF, top_k=top_k, alone=tokens == 1, bias_ER=call.gate_up_bias,
        activation=activation, interleaved=call.interleaved,
    )  # fmt: skip
    y_SD = torch.empty(len(expert_S), call.down.rows, dtype=torch.float32, device=a_SF.device)
    products(call.down, a_SF, expert_S, y_SD, alone=tokens == 1, bias_ER=call.down_bias)
    return torch.bmm(call.weight_TK[:, None].float(), y_SD.view(tokens, top_k, call.down.rows)).squeeze(1)


def matvec(experts: TernaryExperts, x_SN: Tensor, expert_S: Tensor, y_SR: Tensor) -> None:
    """y_s = W_e x_s with e = expert_s; zeros for an id outside 0..E-1."""
    products(experts, x_SN, expert_S, y_SR, alone=len(x_SN) == 1)


def products(
    experts: TernaryExperts,
    x: Tensor,
    expert_S: Tensor,
    y_SF: Tensor,
    *,
    top_k: int = 1,
    alone: bool = False,
    bias_ER: Tensor | None = None,
    activation: Activation = IDENTITY,
    interleaved: bool = False,
) -> None:
    """y_s = a(W_e x + b_e) with e = expert_s and x row s // top_k; zeros for an id outside 0..E-1.

    `alone`: no two rows have the same expert.
    """
    rows, width = len(expert_S), y_SF.shape[1]
    choice = tuning.ternary(target.of(x))
    block_t = 1 if alone else choice.tokens
    block_r, block_c = choice.tile(experts.codes_of_a_row, block_t)
    with target.on(x):
        products_kernel[(rows, triton.cdiv(width, block_r))](
            x, experts.codes, experts.offsets, experts.levels_ER2, experts.table, expert_S, bias_ER, y_SF,
            rows, x.stride(0), x.stride(1), *strides(bias_ER),
            experts.experts, experts.rows, experts.width, width, top_k, *halves(width, activation, interleaved),
            bias_ER is not None, *constants(activation), experts.slots,
            max(16, triton.next_power_of_2(rows)), block_t, block_r, block_c, num_warps=choice.warps,
        )  # fmt: skip


def empty(experts: TernaryExperts, matrices: int) -> Tensor:
    """Room for so many matrices."""
    return experts.levels_ER2.new_empty(matrices, experts.rows, experts.width)


def decode(experts: TernaryExperts, which: Tensor, out_ARN: Tensor) -> None:
    """The matrices of some experts; an id outside 0..E-1 leaves its matrix as it was."""
    choice = tuning.ternary(target.of(out_ARN))
    block_r, block_c = choice.tile(experts.codes_of_a_row, 1)
    with target.on(out_ARN):
        decode_kernel[(triton.cdiv(experts.rows, block_r), len(which))](
            experts.codes, experts.offsets, experts.levels_ER2, experts.table, which, out_ARN,
            experts.experts, experts.rows, experts.width, experts.slots,
            block_r, block_c, min(1024 // block_r, triton.next_power_of_2(max(1, experts.width))),
            num_warps=choice.warps,
        )  # fmt: skip


@triton.jit
def read_rows(codes_ptr, offsets_ptr, levels_ptr, expert, r, used, R: tl.constexpr):
    """The expert's first codeword; of rows r the first one and the last plus one, counted from there; their levels."""
    row = expert * R + r
    base = tl.load(offsets_ptr + expert * R)
    at = (tl.load(offsets_ptr + row, mask=used, other=0) - base).to(tl.int32)
    end = (tl.load(offsets_ptr + row + 1, mask=used, other=0) - base).to(tl.int32)
    minus = tl.load(levels_ptr + 2 * row, mask=used, other=0.0).to(tl.float32)
    plus = tl.load(levels_ptr + 2 * row + 1, mask=used, other=0.0).to(tl.float32)
    return codes_ptr + base, at, end, minus, plus


@triton.jit
def read_phrases(codes_ptr, table_ptr, at, end, start, BLOCK_C: tl.constexpr):
    """The entries of codewords at..at + BLOCK_C of each row, in two halves; where each phrase starts; where the next.

    Args:
        at, end: the first codeword of the tile and the last one of each row plus one [BLOCK_R].
        start: where the first of these phrases starts [BLOCK_R].
    """
    code = at[:, None] + tl.arange(0, BLOCK_C)[None, :]
    inside = code < end[:, None]
    number = tl.load(codes_ptr + code, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
    # Triton lays lanes along the dimension where it takes addresses to be contiguous; where none is, before 3.9, down
    # the rows, and then every step goes through shared memory. Hence a hint that is not true. Nothing is said of
    # alignment, so each lane loads one entry all the same.
    entry = tl.load(
        table_ptr + tl.max_contiguous(number, [1, 2]), mask=inside, other=NO_WEIGHT, eviction_policy="evict_last"
    )
    low, high = entry.to(tl.int32), (entry >> 32).to(tl.int32)
    length = low & 255
    return low, high, start[:, None] + tl.cumsum(length, axis=1) - length, start + tl.sum(length, axis=1)


@triton.jit
def read_slot(low, high, starts, minus, plus, N: tl.constexpr, SLOT: tl.constexpr):
    """The column, the weight, and whether there is one, in a slot of each phrase."""
    if SLOT < 3:
        offset = (low >> (8 * SLOT + 8)) & 255
    else:
        offset = (high >> (8 * SLOT - 24)) & 255
    column = tl.max_contiguous(starts + offset, [1, 2])
    weight = tl.where((high >> (24 + SLOT)) & 1 != 0, plus[:, None], minus[:, None])
    return column, weight, (offset != 255) & (column < N)


@triton.jit
def row_sums(
    x_ptrs, codes_ptr, offsets_ptr, levels_ptr, table_ptr, expert, r, used, stride_xn,
    R: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The products of some rows with the x of each token, float32 [BLOCK_R].

    Args:
        x_ptrs: where the x of each of BLOCK_T tokens begins.
        r: the rows of the expert [BLOCK_R], and which of them are `used`.
    """
    codes_ptr, at, end, minus, plus = read_rows(codes_ptr, offsets_ptr, levels_ptr, expert, r, used, R)
    start = tl.zeros([BLOCK_R], tl.int32)
    totals = ()
    for _ in tl.static_range(BLOCK_T):
        totals = totals + (tl.zeros([BLOCK_R, BLOCK_C], tl.float32),)
    for done in range(0, tl.max(end - at, axis=0), BLOCK_C):
        low, high, starts, start = read_phrases(codes_ptr, table_ptr, at + done, end, start, BLOCK_C)
        for slot in tl.static_range(SLOTS):
            column, weight, is_weight = read_slot(low, high, starts, minus, plus, N, slot)
            grown = ()
            for t in tl.static_range(BLOCK_T):
                x = tl.load(x_ptrs[t] + column * stride_xn, mask=is_weight, other=0.0)
                grown = grown + (totals[t] + weight * x.to(tl.float32),)
            totals = grown
    sums = ()
    for t in tl.static_range(BLOCK_T):
        sums = sums + (tl.sum(totals[t], axis=1),)
    return sums


@triton.jit
def products_kernel(
    x_ptr, codes_ptr, offsets_ptr, levels_ptr, table_ptr, expert_ptr, bias_ptr, y_ptr,
    rows, stride_xs, stride_xn, stride_be, stride_br,
    E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    STEP: tl.constexpr, OTHER: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    SLOTS: tl.constexpr, ALL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[s, f] for a block of f and up to BLOCK_T rows s of one expert.

    Every s has a program. It counts the rows of its expert before it: if they are a multiple of BLOCK_T, it takes
    itself and the next ones, else another program has taken it. So nothing is sorted before.
    """
    s = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.load(expert_ptr + s).to(tl.int64)
    if (expert < 0) | (expert >= E):
        tl.store(y_ptr + s.to(tl.int64) * F + f, tl.zeros([BLOCK_R], y_ptr.dtype.element_ty), mask=f < F)
        return
    members = (s,)
    if BLOCK_T > 1:
        i = tl.arange(0, ALL)
        same = tl.load(expert_ptr + i, mask=i < rows, other=-1).to(tl.int64) == expert
        count = tl.cumsum(same.to(tl.int32), axis=0)
        before = tl.sum(tl.where(same & (i < s), 1, 0), axis=0)
        if before % BLOCK_T != 0:
            return
        for t in tl.static_range(1, BLOCK_T):
            members = members + (tl.max(tl.where(same & (count == before + 1 + t), i, -1), axis=0),)
    x_ptrs = ()
    for t in tl.static_range(BLOCK_T):
        x_ptrs = x_ptrs + (x_ptr + (tl.maximum(members[t], 0) // TOP_K).to(tl.int64) * stride_xs,)
    used = f < F
    gates = row_sums(
        x_ptrs, codes_ptr, offsets_ptr, levels_ptr, table_ptr, expert, f * STEP, used, stride_xn,
        R, N, SLOTS, BLOCK_T, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    ups = gates
    if GATED:
        ups = row_sums(
            x_ptrs, codes_ptr, offsets_ptr, levels_ptr, table_ptr, expert, f * STEP + OTHER, used, stride_xn,
            R, N, SLOTS, BLOCK_T, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    gate_bias = tl.zeros([BLOCK_R], tl.float32)
    up_bias = tl.zeros([BLOCK_R], tl.float32)
    if BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + f * STEP * stride_br
        gate_bias = tl.load(bias_ptrs, mask=used, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptrs + OTHER * stride_br, mask=used, other=0.0).to(tl.float32)
    for t in tl.static_range(BLOCK_T):
        y = activate(gates[t] + gate_bias, ups[t] + up_bias, KIND, GATED, LIMIT, ALPHA, OFFSET)
        y_ptrs = y_ptr + members[t].to(tl.int64) * F + f
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=f < tl.where(members[t] >= 0, F, 0))


@triton.jit
def decode_kernel(
    codes_ptr, offsets_ptr, levels_ptr, table_ptr, which_ptr, out_ptr,
    E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[a, r] for a block of r: zeros first, then, once they are all written, the weights that are not."""
    expert = tl.load(which_ptr + tl.program_id(1)).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = r < R
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * R + r)[:, None] * N
    n = tl.arange(0, BLOCK_N)[None, :]
    for first in range(0, N, BLOCK_N):
        zeros = tl.zeros([BLOCK_R, BLOCK_N], out_ptr.dtype.element_ty)
        tl.store(out_ptrs + first + n, zeros, mask=used[:, None] & (first + n < N))
    tl.debug_barrier()
    codes_ptr, at, end, minus, plus = read_rows(codes_ptr, offsets_ptr, levels_ptr, expert, r, used, R)
    start = tl.zeros([BLOCK_R], tl.int32)
    for done in range(0, tl.max(end - at, axis=0), BLOCK_C):
        low, high, starts, start = read_phrases(codes_ptr, table_ptr, at + done, end, start, BLOCK_C)
        for slot in tl.static_range(SLOTS):
            column, weight, is_weight = read_slot(low, high, starts, minus, plus, N, slot)
            tl.store(out_ptrs + column, weight.to(out_ptr.dtype.element_ty), mask=is_weight)
