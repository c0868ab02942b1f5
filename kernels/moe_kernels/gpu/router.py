"""The router in one kernel: scores, the choice inside the best groups, and the weights; and its gradient in another.

A choice is made by one int64 key: the score's bits, turned so that integers order as floats do, above the complement
of the expert's id. The largest key is the best score, and among equals the lowest id; no key appears twice.

Legend: T tokens, E experts, K top-k, NG groups of EG experts; P marks a power of two that is at least as large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import target

ELEMENTS = 2048
"""Scores of one program: as many tokens as fit in registers without a spill."""


def forward(
    logits_TE: Tensor,
    selection_bias_E: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """index [T, K] int64 and weight [T, K] float32."""
    tokens, experts = logits_TE.shape
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weight = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    groups_padded, size_padded = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    block = max(1, ELEMENTS // (groups_padded * size_padded))
    if tokens:
        with target.on(logits_TE):
            forward_kernel[(triton.cdiv(tokens, block),)](
                logits_TE, selection_bias_E, index, weight, tokens, *logits_TE.stride(), scale,
                experts, groups, experts // groups, groups_padded, size_padded,
                top_k, triton.next_power_of_2(top_k), top_groups,
                score == "sigmoid", selection_bias_E is not None, group_score == "top2", renormalise, block,
            )  # fmt: skip
    return index, weight


def backward(
    dweight_TK: Tensor, logits_TE: Tensor, index_TK: Tensor, score: str, renormalise: bool, scale: float
) -> Tensor:
    """The gradient to the logits [T, E]."""
    tokens, experts = logits_TE.shape
    dlogits = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    padded = triton.next_power_of_2(experts)
    block = max(1, ELEMENTS // padded)
    if tokens:
        with target.on(logits_TE):
            backward_kernel[(triton.cdiv(tokens, block),)](
                dweight_TK, logits_TE, index_TK, dlogits, tokens, *logits_TE.stride(), scale,
                experts, padded, index_TK.shape[1], score == "sigmoid", renormalise, block,
            )  # fmt: skip
    return dlogits


@triton.jit
def scores_of(z, exists, SIGMOID: tl.constexpr):
    """Scores [BLOCK, EP] in float32; zero where there is no expert."""
    if SIGMOID:
        p = tl.sigmoid(z)
    else:
        e = tl.exp(z - tl.max(z, axis=1)[:, None])
        p = e / tl.sum(e, axis=1)[:, None]
    return tl.where(exists, p, 0.0)


@triton.jit
def forward_kernel(
    logits_ptr, bias_ptr, index_ptr, weight_ptr, tokens, stride_t, stride_e, scale,
    E: tl.constexpr, NG: tl.constexpr, EG: tl.constexpr, NGP: tl.constexpr, EGP: tl.constexpr,
    TOP_K: tl.constexpr, KP: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens, all experts, held as NGP groups of EGP side by side."""
    EP: tl.constexpr = NGP * EGP
    lowest: tl.constexpr = -9223372036854775808
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, EP)
    group = slot // EGP
    e = group * EG + slot % EGP
    exists = ((group < NG) & (slot % EGP < EG))[None, :]
    z = tl.load(
        logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :] * stride_e,
        mask=(t < tokens)[:, None] & exists,
        other=-float("inf"),
    ).to(tl.float32)
    z = tl.where((t < tokens)[:, None], z, 0.0)
    p = scores_of(z, exists, SIGMOID)
    choice = p
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=(group < NG) & (slot % EGP < EG), other=0.0).to(tl.float32)[None, :]
    if NG > 1:
        choice = tl.where(exists, choice, -float("inf"))
        inside = tl.reshape(choice, (BLOCK, NGP, EGP))
        value = tl.max(inside, axis=2)
        if TOP2:
            first = tl.argmax(inside, axis=2)
            others = tl.where(tl.arange(0, EGP)[None, None, :] == first[:, :, None], -float("inf"), inside)
            value += tl.max(others, axis=2)
        name = tl.arange(0, NGP)
        key = tl.where((name < NG)[None, :], ordered(value, name[None, :]), lowest)
        kept = tl.zeros([BLOCK, NGP], tl.int32)
        for _ in range(TOP_GROUPS):
            best = key == tl.max(key, axis=1)[:, None]
            kept = tl.where(best, 1, kept)
            key = tl.where(best, lowest, key)
        chosen = tl.broadcast_to(kept[:, :, None], (BLOCK, NGP, EGP))
        exists = exists & (tl.reshape(chosen, (BLOCK, EP)) > 0)
    key = tl.where(exists, ordered(choice, e[None, :]), lowest)
    column = tl.arange(0, KP)
    weight = tl.zeros([BLOCK, KP], tl.float32)
    index = tl.zeros([BLOCK, KP], tl.int32)
    for k in range(TOP_K):
        best = key == tl.max(key, axis=1)[:, None]
        here = (column == k)[None, :]
        weight = tl.where(here, tl.sum(tl.where(best, p, 0.0), axis=1)[:, None], weight)
        index = tl.where(here, tl.sum(tl.where(best, e[None, :], 0), axis=1)[:, None], index)
        key = tl.where(best, lowest, key)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
    at = t.to(tl.int64)[:, None] * TOP_K + column[None, :]
    mask = (t < tokens)[:, None] & (column < TOP_K)[None, :]
    tl.store(index_ptr + at, index.to(tl.int64), mask=mask)
    tl.store(weight_ptr + at, weight * scale, mask=mask)


@triton.jit
def ordered(value, name):
    """int64 keys that order as the float32 values do, the lower name first among equals (-0 counts as 0)."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - name).to(tl.int64)


@triton.jit
def backward_kernel(
    dweight_ptr, logits_ptr, index_ptr, dlogits_ptr, tokens, stride_t, stride_e, scale,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits from dweight: the scores once more, the normalisation undone, then the softmax's or the sigmoid's own."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EP)
    real = (t < tokens)[:, None]
    exists = (e < E)[None, :]
    z = tl.load(
        logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :] * stride_e, mask=real & exists, other=-float("inf")
    ).to(tl.float32)
    p = scores_of(tl.where(real, z, 0.0), exists, SIGMOID)
    dp = tl.zeros([BLOCK, EP], tl.float32)
    chosen = tl.zeros([BLOCK, EP], tl.int32)
    for k in range(TOP_K):
        at = t.to(tl.int64) * TOP_K + k
        here = tl.load(index_ptr + at, mask=t < tokens, other=0)[:, None] == e[None, :]
        dp = tl.where(here, scale * tl.load(dweight_ptr + at, mask=t < tokens, other=0.0)[:, None], dp)
        chosen = tl.where(here, 1, chosen)
    if RENORMALISE:
        total = tl.sum(tl.where(chosen > 0, p, 0.0), axis=1)[:, None] + 1e-20
        dp = tl.where(chosen > 0, dp - tl.sum(dp * p, axis=1)[:, None] / total, 0.0) / total
    if SIGMOID:
        dz = dp * p * (1 - p)
    else:
        dz = p * (dp - tl.sum(dp * p, axis=1)[:, None])
    tl.store(
        dlogits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], dz.to(dlogits_ptr.dtype.element_ty), mask=real & exists
    )
