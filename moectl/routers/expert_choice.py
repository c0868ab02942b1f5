"""Expert choice (arXiv 2202.09368): each expert takes its best tokens, however many experts a token then has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity
from moectl.routers.capped import assigned
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class ExpertChoiceOptions(Options):
    """Section 3.2.

    Attributes:
        top_k: experts per token, on average: the paper's capacity factor c.
        capacity_factor: times that.
        most: how many experts a token may have (section 3.3); 0: any number.
    """

    top_k: int = 2
    capacity_factor: float = 1.0
    most: int = 0


class ExpertChoice(Router):
    """S = softmax over experts; each takes the k = c * T / E tokens with its largest S_te, weighted by S_te (section
    3.2, eq. 1-2; numbers from memory).

    Not causal: whether a token is taken depends on all others, later ones too. All tokens that are given compete: a
    batch, as in the paper. A token's choices are sorted by weight, and there are as many columns as the most that one
    token has. With `most` tokens are chosen by the solution of an entropy-regularised linear program (`capped.py`); of
    independent scores less than one token in a hundred has one expert more; among equal scores the first token wins, so
    that of copies of one token, or where probabilities are all 0 or 1, some can have many more. The paper finds that a
    cap of 2 does worse.

    Implementations: flaxformer's `ExpertsChooseMaskedRouter`, of which there are ports to TensorFlow and PyTorch, takes
    the softmax and the top tokens as here, of each group of tokens apart; padding can be chosen too. Rewrites mostly
    round k down; here it is rounded up. No public code with the cap was found: its program, strength and rounds are
    those of two summaries of the paper, and a general optimiser agrees.
    """

    Options = ExpertChoiceOptions

    @property
    def active(self) -> float:
        """The capacity over the tokens."""
        return float(min(self.num_experts, self.options.top_k * self.options.capacity_factor))

    def __init__(self, hidden_size: int | None, num_experts: int, options: ExpertChoiceOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if not self.options.capacity_factor:
            raise ValueError("capacity_factor is 0, and experts would take no tokens")
        if self.options.most < 0:
            raise ValueError(f"most is {self.options.most}, and 0 is no limit")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; there is no loss, since loads are equal."""
        share_TE = wide(scores_TE).softmax(-1)
        (T, E), most = share_TE.shape, self.options.most
        room = min(T, capacity(T, E, self.options.top_k, self.options.capacity_factor))
        choice_TE = share_TE
        if T and 0 < most < E:
            room = min(room, T * most // E)
            choice_TE = assigned(share_TE, room, most) if room else share_TE
        token_CE = choice_TE.argsort(dim=0, descending=True, stable=True)[:room]
        taken_TE = torch.zeros_like(share_TE, dtype=torch.bool).scatter(0, token_CE, True)
        width = max(1, int(taken_TE.sum(1).max())) if T else 1
        order_TK = share_TE.masked_fill(~taken_TE, -1).argsort(dim=1, descending=True, stable=True)[:, :width]
        index_TK = torch.where(taken_TE.gather(1, order_TK), order_TK, NO_EXPERT)
        return routing(index_TK, share_TE.gather(1, order_TK))
