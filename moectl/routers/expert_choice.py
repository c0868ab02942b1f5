"""Expert choice (arXiv 2202.09368): each expert takes its best tokens, however many experts a token then has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class ExpertChoiceOptions(Options):
    """Section 3.2.

    Attributes:
        top_k: experts per token, on average: the paper's capacity factor c.
        capacity_factor: times that.
    """

    top_k: int = 2
    capacity_factor: float = 1.0


class ExpertChoice(Router):
    """S = softmax over experts; each takes the k = c * T / E tokens with its largest S_te, weighted by S_te (eq. 1-2).

    Not causal: whether a token is taken depends on all others, later ones too. All tokens that are given compete: a
    batch, as in the paper (flaxformer: a group). Not built: the cap on a token's experts by a linear program (section
    3.3), which the paper finds to do worse. A token's choices are sorted by weight, and there are as many columns as
    the most that one token has.
    """

    Options = ExpertChoiceOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: ExpertChoiceOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if not self.options.capacity_factor:
            raise ValueError("capacity_factor is 0, and experts would take no tokens")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; there is no loss, since loads are equal."""
        share_TE = wide(scores_TE).softmax(-1)
        T, E = share_TE.shape
        room = min(T, capacity(T, E, self.options.top_k, self.options.capacity_factor))
        token_CE = share_TE.argsort(dim=0, descending=True, stable=True)[:room]
        taken_TE = torch.zeros_like(share_TE, dtype=torch.bool).scatter(0, token_CE, True)
        width = max(1, int(taken_TE.sum(1).max())) if T else 1
        order_TK = share_TE.masked_fill(~taken_TE, -1).argsort(dim=1, descending=True, stable=True)[:, :width]
        index_TK = torch.where(taken_TE.gather(1, order_TK), order_TK, NO_EXPERT)
        return routing(index_TK, share_TE.gather(1, order_TK))
