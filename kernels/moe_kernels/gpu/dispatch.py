"""Dispatch on the device: histogram, scan, scatter; one launch for up to 1024 rows, three for more.

    ids ->  histogram  counts[block, e]      how often each block of ids names each expert
            scan       offsets[e]            where each expert's places start
                       shift[block, e]       what turns a place among a block's sorted ids into a place among all
            scatter    row, inverse          a block sorts (id, position) and adds its shift; ids keep their order
                       schedule              which expert's which rows each row block has

Legend: S routed rows, E experts, EP the power of two >= E, NB blocks of ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import target
from moe_kernels.dispatch import SMALLEST_BLOCK, Dispatch

IDS = 1024
MOST_EXPERTS = 32_767


def launch(index_TK: Tensor, num_experts: int, block_m: int) -> Dispatch:
    """`dispatch` by the kernels.

    Raises:
        ValueError: more experts than 32,767, for an id shares 32 bits with a position.
    """
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"{num_experts} experts are more than {MOST_EXPERTS}")
    index_S = index_TK.reshape(-1)
    rows, device = len(index_S), index_S.device

    def integers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    offsets, row, inverse, n_blocks = integers(num_experts + 1), integers(rows), integers(rows), integers(1)
    schedule = integers(num_experts + rows // SMALLEST_BLOCK, 2)
    plan = Dispatch(offsets, row, inverse, schedule, n_blocks, index_TK.shape[1], block_m)
    padded = max(16, triton.next_power_of_2(num_experts))
    with target.on(index_S):
        if rows <= IDS:
            block = max(16, triton.next_power_of_2(rows))
            small_kernel[(1,)](
                index_S, offsets, row, inverse, schedule, n_blocks, rows, plan.most_blocks,
                num_experts, padded, block, block_m,
            )  # fmt: skip
            return plan
        blocks = triton.cdiv(rows, IDS)
        counts, shift, block_end = integers(blocks, padded), integers(blocks, padded), integers(padded)
        histogram_kernel[(blocks,)](index_S, counts, rows, num_experts, padded, IDS)
        scan_kernel[(1,)](counts, shift, offsets, block_end, n_blocks, blocks, num_experts, padded, block_m, 8)
        share = triton.cdiv(plan.most_blocks, blocks)
        scatter_kernel[(blocks,)](
            index_S, shift, block_end, row, inverse, schedule, n_blocks, rows, share, num_experts, padded, IDS
        )
    return plan


@triton.jit
def read_ids(index_ptr, first, rows, E: tl.constexpr, IDS: tl.constexpr):
    """The expert ids of a block; E for those that nobody here takes."""
    s = first + tl.arange(0, IDS)
    ids = tl.load(index_ptr + s, mask=s < rows, other=-1).to(tl.int64)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def sort_ids(ids, IDS: tl.constexpr):
    """The ids in order, and the position in the block that each came from; equal ids keep their order."""
    key = tl.sort((ids << 16) | tl.arange(0, IDS))
    return key >> 16, key & 0xFFFF


@triton.jit
def write_schedule(schedule_ptr, block_end, n_blocks, first, count, E: tl.constexpr, EP: tl.constexpr):
    """Lines first..first+count of the schedule; block_end[e] is how many row blocks the experts up to e have."""
    known = tl.arange(0, EP) < E
    for start in range(first, first + count, 16):
        i = start + tl.arange(0, 16)
        passed = (block_end[None, :] <= i[:, None]) & known[None, :]
        expert = tl.sum(passed.to(tl.int32), axis=1)
        begin = tl.max(tl.where(passed, block_end[None, :], 0), axis=1)
        mask = (i < n_blocks) & (i < first + count)
        tl.store(schedule_ptr + 2 * i, expert, mask=mask)
        tl.store(schedule_ptr + 2 * i + 1, i - begin, mask=mask)


@triton.jit
def small_kernel(
    index_ptr, offsets_ptr, row_ptr, inverse_ptr, schedule_ptr, n_blocks_ptr, rows, most_blocks,
    E: tl.constexpr, EP: tl.constexpr, IDS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Everything in one program."""
    ids = read_ids(index_ptr, 0, rows, E, IDS)
    e = tl.arange(0, EP)
    count = tl.histogram(tl.where(ids < E, ids, 0), EP, mask=ids < E)
    end = tl.cumsum(count, axis=0)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + e, end, mask=e < E)
    expert, position = sort_ids(ids, IDS)
    place = tl.arange(0, IDS)
    tl.store(row_ptr + place, position, mask=expert < E)
    tl.store(inverse_ptr + position, tl.where(expert < E, place, -1), mask=position < rows)
    block_end = tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, axis=0)
    n_blocks = tl.max(block_end, axis=0)
    tl.store(n_blocks_ptr, n_blocks)
    write_schedule(schedule_ptr, block_end, n_blocks, 0, most_blocks, E, EP)


@triton.jit
def histogram_kernel(index_ptr, counts_ptr, rows, E: tl.constexpr, EP: tl.constexpr, IDS: tl.constexpr):
    """counts[block, e], one program a block."""
    block = tl.program_id(0)
    ids = read_ids(index_ptr, block * IDS, rows, E, IDS)
    count = tl.histogram(tl.where(ids < E, ids, 0), EP, mask=ids < E)
    tl.store(counts_ptr + block * EP + tl.arange(0, EP), count)


@triton.jit
def scan_kernel(
    counts_ptr, shift_ptr, offsets_ptr, block_end_ptr, n_blocks_ptr, blocks,
    E: tl.constexpr, EP: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """offsets, shift and the row blocks' ends from the counts: two walks over them in one program."""
    e = tl.arange(0, EP)
    c = tl.arange(0, CHUNK)
    total = tl.zeros([EP], tl.int32)
    for first in range(0, blocks, CHUNK):
        b = first + c
        total += tl.sum(tl.load(counts_ptr + b[:, None] * EP + e[None, :], mask=(b < blocks)[:, None], other=0), axis=0)
    end = tl.cumsum(total, axis=0)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + e, end, mask=e < E)
    block_end = tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, axis=0)
    tl.store(block_end_ptr + e, block_end)
    tl.store(n_blocks_ptr, tl.max(block_end, axis=0))
    base = end - total
    for first in range(0, blocks, CHUNK):
        b = first + c
        count = tl.load(counts_ptr + b[:, None] * EP + e[None, :], mask=(b < blocks)[:, None], other=0)
        earlier = tl.cumsum(count, axis=0) - count
        smaller = tl.cumsum(count, axis=1) - count
        shift = base[None, :] + earlier - smaller
        tl.store(shift_ptr + b[:, None] * EP + e[None, :], shift, mask=(b < blocks)[:, None])
        base += tl.sum(count, axis=0)


@triton.jit
def scatter_kernel(
    index_ptr, shift_ptr, block_end_ptr, row_ptr, inverse_ptr, schedule_ptr, n_blocks_ptr, rows, share,
    E: tl.constexpr, EP: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """row, inverse, and this program's share of the schedule."""
    block = tl.program_id(0)
    expert, position = sort_ids(read_ids(index_ptr, block * IDS, rows, E, IDS), IDS)
    kept = expert < E
    place = tl.arange(0, IDS) + tl.load(shift_ptr + block * EP + expert, mask=kept, other=0)
    row = block * IDS + position
    tl.store(row_ptr + place, row, mask=kept)
    tl.store(inverse_ptr + row, tl.where(kept, place, -1), mask=row < rows)
    block_end = tl.load(block_end_ptr + tl.arange(0, EP))
    write_schedule(schedule_ptr, block_end, tl.load(n_blocks_ptr), block * share, share, E, EP)
