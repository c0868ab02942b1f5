"""Experts in groups, one group per device or node: how many groups a token may reach.

Legend: T tokens, E experts, G groups, M experts of a group.
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
    group_TGM = choice_TE.unflatten(1, (groups, -1))
    score_TG = group_TGM.amax(-1) if best == 1 else group_TGM.gather(-1, top(group_TGM, best)).sum(-1)
    closed_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, top(score_TG, top_groups), False)
    return group_TGM.masked_fill(closed_TG[..., None], -math.inf).flatten(1)
