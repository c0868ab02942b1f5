"""Room: how many tokens an expert takes, and who gets a place when there are too few.

Conventions differ by a rounding that changes what is dropped; each is named after who uses it.
Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moectl.routers.protocol import NO_EXPERT

Convention = Literal["switch", "tutel", "megatron"]


def capacity(tokens: int, num_experts: int, top_k: int, factor: float, convention: Convention = "switch") -> int:
    """Places per expert.

    switch: ceil(factor * k * T / E) (arXiv 2101.03961, eq. 3, for k choices as in V-MoE, arXiv 2106.05974, eq. 3);
    tutel: k * int(factor * ceil(T / E)) (microsoft/Tutel, `extract_critical`);
    megatron: ceil(k * T / E * factor) (NVIDIA/Megatron-LM, `get_capacity`), which rounds after other products.
    """
    if convention == "tutel":
        return top_k * int(factor * -(-tokens // num_experts))
    if convention == "megatron":
        return math.ceil(top_k * tokens / num_experts * factor)
    return math.ceil(factor * top_k * tokens / num_experts)


def places(
    index_TK: Tensor, num_experts: int, priority_T: Tensor | None = None, sequence_T: Tensor | None = None
) -> Tensor:
    """The place of each assignment in its expert's queue, from 0 [T, K]; NO_EXPERT in, NO_EXPERT out.

    All first choices queue before any second one (arXiv 2006.16668, algorithm 1); within a rank tokens queue in their
    order, or by falling `priority_T` (V-MoE's batch prioritised routing, arXiv 2106.05974, section 3.3). With
    `sequence_T` an expert has a queue for each sequence.
    """
    T, K = index_TK.shape
    order_T = torch.arange(T, device=index_TK.device)
    if priority_T is not None:
        order_T = priority_T.argsort(descending=True, stable=True)
    line_TK = index_TK if sequence_T is None else index_TK + num_experts * sequence_T[:, None]
    line_S = torch.where(index_TK == NO_EXPERT, NO_EXPERT, line_TK)[order_T].t().flatten()  # rank by rank
    order_S = line_S.argsort(stable=True)  # a sort and not a one-hot table: memory that does not grow with the experts
    sorted_S = line_S[order_S]
    place_S = torch.empty_like(line_S)
    place_S[order_S] = torch.arange(T * K, device=line_S.device) - torch.searchsorted(sorted_S, sorted_S)
    place_TK = torch.empty_like(index_TK)
    place_TK[order_T] = torch.where(line_S == NO_EXPERT, NO_EXPERT, place_S).view(K, T).t()
    return place_TK


def kept(
    index_TK: Tensor,
    num_experts: int,
    room: int,
    priority_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
) -> Tensor:
    """Which assignments find one of `room` places of their expert, bool [T, K]."""
    return places(index_TK, num_experts, priority_T, sequence_T) < room
