"""Ternary experts on a CPU: loops over codewords that numba compiles at their first call.

Measured on one Zen 4 core with a table for 90 % zeros, 27 weights a codeword, and one matrix of 14336 x 4096:

    1 token     7 ms     torch.mv takes 19 ms in bfloat16 and 11 ms in float32
    8 tokens    8 ms     they share an entry and the address of x
    16 tokens  10 ms     in bfloat16 decoding takes 20 ms, and the product of 16 tokens 16 ms after that

Within a table hardly any two phrases differ in how many weights are not zero. So the first three slots are taken
without asking, an empty one as a place after the row where x is zero: a branch on each would be mispredicted once a
codeword.

Legend: S routed rows, N weights in a row (inputs), R rows of a matrix (outputs), A matrices to decode, J jobs: up to W
rows of x and their expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from moe_kernels.cpu.compiled import compiled, share

if TYPE_CHECKING:
    from moe_kernels.ternary import Call, TernaryExperts

BLOCKS = (1, 8, 16)
"""W: the smallest that holds an expert's rows of x, or the largest as often as it takes."""
FEW = {2: 64, 4: 512, 8: 0}
"""Up to so many rows of x an expert codewords are multiplied, by bytes of a weight: torch's products of float32 are
slower, and float64 would not get sums of its own."""
WORTH_A_THREAD = 1 << 16
"""Codewords; a thread takes some tens of microseconds to start, and these take it half a millisecond."""

UNUSED, ONE, BYTE, SIGNS = np.uint64(255), np.uint64(1), np.uint64(8), np.uint64(56)
CERTAIN, ALL = np.uint64(3), np.uint64(6)
MOST_CODES = 1 << 16
"""Of a row, whose codewords are counted by 16 bits."""
OVERHANG = 256
"""Places after a row where x is zero: of empty slots, and of phrases that reach beyond it."""


def few(call: Call) -> bool:
    """Whether the codewords themselves are multiplied, by the mean number of rows of an expert that has any."""
    hit = len(torch.unique(call.index_TK))
    return call.index_TK.numel() <= FEW[call.up.dtype.itemsize] * hit


def matvec(experts: TernaryExperts, x_SN: Tensor, expert_S: Tensor, y_SR: Tensor) -> None:
    """y_s = W_e x_s with e = expert_s; zeros for an id outside 0..E-1."""
    sorted_S, order_S = expert_S.sort(stable=True)
    ids, counts = torch.unique_consecutive(sorted_S, return_counts=True)
    ends = counts.cumsum(0).tolist()
    jobs = [
        (expert, start, min(BLOCKS[-1], end - start))
        for expert, begin, end in zip(ids.tolist(), [0, *ends], ends, strict=False)
        for start in range(begin, end, BLOCKS[-1])
        if 0 <= expert < experts.experts
    ]
    sums_SR = torch.zeros(y_SR.shape)
    if jobs:
        lanes = (0,) * next(block for block in BLOCKS if block >= max(count for _, _, count in jobs))
        level_JR2 = experts.levels_ER2[[expert for expert, _, _ in jobs]].float().numpy()
        x = x_SN[order_S].float().contiguous().numpy()
        given = (*_coded(experts), level_JR2, np.array(jobs), x, sums_SR.numpy(), lanes)
        share(_products, given, experts.rows, _worth(experts, len(jobs)))
    y_SR[order_S] = sums_SR.to(y_SR.dtype)


def empty(experts: TernaryExperts, matrices: int) -> Tensor:
    """Room for so many matrices: numpy asks for large pages, without which touching it takes longer than decoding."""
    size = matrices * experts.rows * experts.width
    bits = torch.from_numpy(np.empty(size, f"i{experts.dtype.itemsize}"))
    return bits.view(experts.dtype).view(matrices, experts.rows, experts.width)


def decode(experts: TernaryExperts, which: Tensor, out_ARN: Tensor) -> None:
    """The matrices of some experts; an id outside 0..E-1 leaves its matrix as it was."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[experts.dtype.itemsize]
    levels, out = experts.levels_ER2.contiguous().view(bits).numpy(), out_ARN.view(bits).numpy()
    known = [(place, expert) for place, expert in enumerate(which.tolist()) if 0 <= expert < experts.experts]
    given = (*_coded(experts), levels, np.array(known, np.int64).reshape(-1, 2), out)
    share(_weights, given, experts.rows, _worth(experts, len(known)))


def _coded(experts: TernaryExperts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return experts.codes.numpy(), experts.offsets.numpy(), experts.table.numpy().view(np.uint64)


def _worth(experts: TernaryExperts, matrices: int) -> float:
    """How many threads so many matrices are worth."""
    return matrices * experts.rows * experts.codes_of_a_row / WORTH_A_THREAD


@intrinsic
def add_scaled(context: Any, total: Any, to: Any, x: Any, at: Any, weight: Any, lanes: Any) -> Any:
    """total[to : to + W] += weight * x[at : at + W] as one vector operation; W is the length of the tuple `lanes`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> None:
        vector = ir.VectorType(ir.FloatType(), lanes.count)
        nothing = ir.Constant(vector, ir.Undefined)

        def pointer(kind: Any, array: Any, index: Any) -> Any:
            data = target.make_array(kind)(target, builder, array).data
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        sums, values = pointer(total, *arguments[:2]), pointer(x, *arguments[2:4])
        first = builder.insert_element(nothing, arguments[4], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), None)
        product = builder.fmul(builder.load(values, align=4), builder.shuffle_vector(first, nothing, zeros))
        builder.store(builder.fadd(builder.load(sums, align=4), product), sums, align=4)

    return types.void(total, to, x, at, weight, lanes), generate


@compiled
def _fetch(codes: np.ndarray, offsets: np.ndarray, table: np.ndarray, row: int, entries: np.ndarray) -> np.uint64:
    """The entries of a row, and how many they are. Fetched beforehand, they do not wait for what is done with each."""
    begin, end = np.uint64(offsets[row]), np.uint64(offsets[row + 1])
    for code in range(end - begin):
        entries[code] = table[codes[begin + code]]
    return end - begin


@compiled
def _products(
    codes: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    level_JR2: np.ndarray,
    job_J3: np.ndarray,
    x_SN: np.ndarray,
    y_SR: np.ndarray,
    lanes: tuple[int, ...],
    first: int,
    last: int,
) -> None:
    """Rows first..last of each job's y. A job is an expert, the first of its rows of x and how many they are."""
    block, width = np.uint64(len(lanes)), np.uint64(x_SN.shape[1])
    entries = np.empty(MOST_CODES, np.uint64)
    x = np.zeros((x_SN.shape[1] + OVERHANG) * len(lanes), np.float32)
    level, total = np.zeros(2, np.float32), np.zeros(3 * len(lanes), np.float32)
    for job in range(len(job_J3)):
        expert, start, count = job_J3[job]
        for lane in range(len(lanes)):
            for column in range(x_SN.shape[1]):
                x[column * len(lanes) + lane] = x_SN[start + lane, column] if lane < count else 0
        for row in range(first, last):
            level[0], level[1] = level_JR2[job, row, 0], level_JR2[job, row, 1]
            total[:] = 0
            at = np.uint64(0)
            for code in range(_fetch(codes, offsets, table, expert * y_SR.shape[1] + row, entries)):
                if at >= width:
                    break
                entry = entries[code]
                signs = entry >> SIGNS
                for slot in range(CERTAIN):
                    offset = entry >> BYTE * slot + BYTE & UNUSED
                    column = width + offset if offset == UNUSED else at + offset
                    add_scaled(total, slot * block, x, column * block, level[signs >> slot & ONE], lanes)
                for slot in range(CERTAIN, ALL):
                    offset = entry >> BYTE * slot + BYTE & UNUSED
                    if offset == UNUSED:
                        break
                    add_scaled(total, np.uint64(0), x, (at + offset) * block, level[signs >> slot & ONE], lanes)
                at += entry & UNUSED
            for lane in range(count):
                y_SR[start + lane, row] = total[lane] + total[lane + len(lanes)] + total[lane + 2 * len(lanes)]


@compiled
def _weights(
    codes: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    level_ER2: np.ndarray,
    known_A2: np.ndarray,
    out_ARN: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Rows first..last of each matrix: pairs of a place in `out` and an expert. A row is put together in the cache."""
    rows, width = out_ARN.shape[1], np.uint64(out_ARN.shape[2])
    entries = np.empty(MOST_CODES, np.uint64)
    weights = np.zeros(out_ARN.shape[2] + OVERHANG, out_ARN.dtype)
    for matrix, expert in known_A2:
        for row in range(first, last):
            minus, plus = level_ER2[expert, row, 0], level_ER2[expert, row, 1]
            weights[:] = 0
            at = np.uint64(0)
            for code in range(_fetch(codes, offsets, table, expert * rows + row, entries)):
                if at >= width:
                    break
                entry = entries[code]
                signs = entry >> SIGNS
                for slot in range(CERTAIN):
                    offset = entry >> BYTE * slot + BYTE & UNUSED
                    column = width + offset if offset == UNUSED else at + offset
                    weights[column] = plus if signs >> slot & ONE else minus
                for slot in range(CERTAIN, ALL):
                    offset = entry >> BYTE * slot + BYTE & UNUSED
                    if offset == UNUSED:
                        break
                    weights[at + offset] = plus if signs >> slot & ONE else minus
                at += entry & UNUSED
            for column in range(width):
                out_ARN[matrix, row, column] = weights[column]
