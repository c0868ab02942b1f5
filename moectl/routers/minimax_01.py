"""MiniMax-01 (arXiv 2501.08313, section 2.1): top-2 with a capacity that all expert-parallel groups share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers.capacity import capacity, places
from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing
from moectl.routers.processes import queued_before, tokens
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class MiniMax01Options(Options):
    """The report's values, where it gives any.

    Attributes:
        capacity_factor: places per expert over choices per expert, of all tokens together; 0: no limit, as in
            transformers. The report gives no value.
        aux_loss: coefficient of GShard's balancing loss.
    """

    capacity_factor: float = 1.25
    aux_loss: float = 0.01


class MiniMax01(Router):
    """Top-2 of a softmax over their sum; GShard's loss; tokens beyond an expert's room are dropped (section 2.1).

    The report's global router gathers the number of tokens per expert over all expert-parallel groups before it drops,
    so that room which one group does not use serves another: the room of all tokens, first choices first. Here the
    groups are the processes of a training, and the loss takes its load over all of them too; in use each is alone.

    Implementations: transformers' class and a port to SGLang (renormalize=True) have the choice and the weights over
    their sum, and no capacity, for they do not train; ours equals the first with a capacity factor of 0. The training
    code is not public: capacity and loss are as the report describes them in words.
    """

    Options = MiniMax01Options

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k, normalize=True)
        room_TK = None
        if options.capacity_factor:
            place_TK, held = places(index_TK, self.num_experts), len(scores_TE)
            if context.training:
                place_TK = place_TK + queued_before(index_TK, self.num_experts).t().gather(0, index_TK)
                held = tokens(held, scores_TE.device)
            room_TK = place_TK < capacity(held, self.num_experts, options.top_k, options.capacity_factor)
        loss = None
        if context.training:
            probability_TE = wide(scores_TE).softmax(-1)
            loss = options.aux_loss * load_balancing(probability_TE, index_TK[:, :1], everywhere=True)
        return routing(index_TK, weight_TK, room_TK, loss)
