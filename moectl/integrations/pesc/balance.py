"""The load-balancing loss, and how the layers' routing gets to it.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What one layer's router did in one forward pass: logits [T, E] and choices [T, K], of which adapter."""

    adapter: str
    logits_TE: Tensor
    index_TK: Tensor
    is_learning: bool


class Recorder:
    """Where layers leave their routing while the model's forward pass runs, and nobody does at other times.

    Gradient checkpointing runs a layer again in the backward pass; what it recorded then would be a second copy.
    """

    def __init__(self) -> None:
        self.routings: list[Routing] | None = None

    def record(self, routing: Routing) -> None:
        """Take note of one layer's routing, if a forward pass is on its way."""
        if self.routings is not None:
            self.routings.append(routing)


def switch_loss(logits_TE: Tensor, index_TK: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e, at its least, 1, when every expert is used alike (arXiv 2101.03961, equations 4 to 6).

    f_e is the share of all choices that fall on expert e, P_e the mean of its probability under the softmax over all
    experts, through which alone the gradient flows. A softmax over the chosen ones, as in the code released with
    PESC, always sums to 1 over the choices, and its gradient is zero.

    Args:
        logits_TE: router logits.
        index_TK: chosen experts.
        mask_T: tokens that count (padding does not); all when None.
    """
    probability_TE = logits_TE.float().softmax(-1)
    chosen_TE = torch.zeros_like(probability_TE).scatter_(-1, index_TK, 1.0)
    tokens, experts = probability_TE.shape
    share_T = probability_TE.new_ones(tokens) if mask_T is None else mask_T.to(probability_TE)
    share_T = share_T / share_T.sum().clamp(min=1)
    return experts * ((share_T @ chosen_TE) / index_TK.shape[1] * (share_T @ probability_TE)).sum()
