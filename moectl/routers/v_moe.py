"""V-MoE (arXiv 2106.05974): noisy softmax, and batch prioritised routing where room is short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.losses import importance_and_load
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class VMoeOptions(Options):
    """The paper's values.

    Attributes:
        capacity_factor: places per expert over choices per expert; 0: no limit.
        room_multiple: places per expert are rounded up to a multiple of it; 4 in the released code.
        priority: whether tokens of the largest probability are served first; else tokens in their order.
        noise: standard deviation on the logits in training, over 1/E.
        aux_loss: coefficient of the mean of the importance and the load loss; of importance alone without noise.
    """

    capacity_factor: float = 1.05
    room_multiple: int = 1
    priority: bool = True
    noise: float = 1.0
    aux_loss: float = 0.01


class VMoe(Router):
    """TopK(softmax(x W + N(0, 1/E^2))), the probabilities as they are (eq. 2), within C = k T c / E places (eq. 3),
    given out rank by rank, and within a rank by falling largest probability (section 3.3, algorithm 2).

    Losses of appendix A: squared CV over experts of the summed probabilities before noise, and of the mean probability
    Phi to be above the k-th noisy logit if the noise were drawn again.

    Implementations: the authors' google-research/vmoe (`nn/routing.py`, `moe.py`) has the same choice, weights and
    queues. It counts room and losses in groups of tokens, rounds room up to a multiple of 4 (`room_multiple`), and adds
    both losses up, each under a coefficient of its own, where ours is their mean; it has GShard's balancing loss too.
    flaxformer has these queues with jitter on the input in place of noise on the logits, and with Switch's loss.
    """

    Options = VMoeOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: VMoeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.room_multiple < 1:
            raise ValueError(f"room_multiple is {self.options.room_multiple}, and 1 is no rounding")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options = self.options
        clean_TE = noisy_TE = wide(scores_TE)
        if context.training and options.noise:
            drawn_TE = torch.empty_like(clean_TE).normal_(generator=context.generator)
            noisy_TE = clean_TE + options.noise / self.num_experts * drawn_TE
        probability_TE = noisy_TE.softmax(-1)
        index_TK = top(noisy_TE, options.top_k)
        room_TK = None
        if options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor)
            room += -room % options.room_multiple
            priority_T = probability_TE.amax(1) if options.priority else None
            room_TK = kept(index_TK, self.num_experts, room, priority_T)
        loss = None
        if context.training:
            deviation = options.noise / self.num_experts
            loss = options.aux_loss * importance_and_load(clean_TE, noisy_TE, options.top_k, deviation)
        return routing(index_TK, probability_TE.gather(1, index_TK), room_TK, loss)
