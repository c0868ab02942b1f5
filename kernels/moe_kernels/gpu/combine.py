"""Each token's sum over its experts' rows, in float32 and in the order of its choices: the same bits on every run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import target
from moe_kernels.dispatch import Dispatch

WIDEST = 2048


def combine(y_SD: Tensor, plan: Dispatch, weight_TK: Tensor | None, out_TD: Tensor) -> Tensor:
    """out_t = sum_k weight_tk * y[place of (t, k)], weights of one where None; a row that nobody took adds zero."""
    tokens, hidden = out_TD.shape
    block = min(WIDEST, triton.next_power_of_2(hidden))
    grid = (tokens, triton.cdiv(hidden, block))
    with target.on(y_SD):
        combine_kernel[grid](
            y_SD, plan.inverse, weight_TK, out_TD, hidden, plan.top_k, weight_TK is not None, block,
            num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return out_TD


@triton.jit
def combine_kernel(
    y_ptr, inverse_ptr, weight_ptr, out_ptr,
    D: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token and a block of columns."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        place = tl.load(inverse_ptr + token * TOP_K + choice)
        width = tl.where(place >= 0, D, 0)
        y = tl.load(y_ptr + place.to(tl.int64) * D + d, mask=d < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + token * TOP_K + choice).to(tl.float32)
        acc += y
    tl.store(out_ptr + token * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
