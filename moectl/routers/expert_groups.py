"""Experts in groups, one group per device or node: how many groups a token may reach.

Legend: T tokens, E experts, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moectl.routers.protocol import top


def check(num_experts: int, groups: int, top_groups: int, top_k: int) -> None:
    """Of the options.

    Raises:
        ValueError: the groups are not of one size, or too few of them are open for the choices.
    """
    if groups < 1 or num_experts % groups:
        raise ValueError(f"groups is {groups}, which does not divide {num_experts} experts")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups is {top_groups}, of {groups} groups")
    if top_k > top_groups * (num_experts // groups):
        raise ValueError(f"{top_groups} of {groups} groups have fewer than top_k = {top_k} experts")


def limited(choice_TE: Tensor, groups: int, top_groups: int, best: int) -> Tensor:
    """The scores, -inf outside of each token's `top_groups` groups: those whose `best` largest scores sum to most."""
    T, E = choice_TE.shape
    size = E // groups
    score_TG = choice_TE.view(T, groups, size).topk(min(best, size)).values.sum(-1)
    open_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, top(score_TG, top_groups), True)
    return choice_TE.masked_fill(~open_TG.repeat_interleave(size, 1), -math.inf)
