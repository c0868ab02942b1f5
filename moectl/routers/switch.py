"""Switch Transformer (arXiv 2101.03961): one expert per token, over its probability, with a capacity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing
from moectl.routers.noise import jittered
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class SwitchOptions(Options):
    """Section 2.2 and appendix.

    Attributes:
        capacity_factor: places per expert over tokens per expert; 0: no limit.
        sequence_room: in place of a factor, places per expert in each sequence (transformers' `expert_capacity`, 64).
        jitter: training multiplies what the gate is given by U(1 - jitter, 1 + jitter).
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    capacity_factor: float = 1.25
    sequence_room: int = 0
    jitter: float = 0.01
    aux_loss: float = 0.01


class Switch(Router):
    """y = p_e * E_e(x) with e = argmax p (eq. 2); a token that finds its expert full goes nowhere."""

    Options = SwitchOptions

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss of eq. 4."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k)
        room_TK = None
        if options.sequence_room:
            room_TK = kept(index_TK, self.num_experts, options.sequence_room, sequence_T=context.sequence_T)
        elif options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor)
            room_TK = kept(index_TK, self.num_experts, room)
        loss = None
        if context.training:
            loss = options.aux_loss * load_balancing(wide(scores_TE).softmax(-1), index_TK)
        return routing(index_TK, weight_TK, room_TK, loss)
