"""GShard's top-2 gate (arXiv 2006.16668, algorithm 1): a second expert by chance, and a capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing, z_loss
from moectl.routers.noise import gumbel_like, jittered, uniform
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class GShardOptions(Options):
    """The paper's values.

    Attributes:
        capacity_factor: places per expert over *tokens* per expert, in training, where a token has two choices (as much
            per choice where it has more): 2 has room for all balanced ones; 0: no limit.
        eval_capacity_factor: the same, in use.
        second: training keeps a further choice of weight w with probability min(1, w / second); 0: always.
        sampled: training draws further choices from the softmax without the first one, and keeps them all.
        shared: whether choices that find room share the weight of those that do not.
        jitter: training multiplies what the gate is given by U(1 - jitter, 1 + jitter).
        aux_loss: coefficient of the balancing loss.
        z_loss: coefficient of the mean squared log-sum-exp.
    """

    capacity_factor: float = 2.0
    eval_capacity_factor: float = 2.0
    second: float = 0.5
    sampled: bool = False
    shared: bool = False
    jitter: float = 0.0
    aux_loss: float = 0.01
    z_loss: float = 0.0


class GShard(Router):
    """Weights g_1, g_2 = p_1, p_2 over their sum; the second is taken with probability min(1, 2 g_2); first come first
    served, all first choices before any second one. A choice that is not taken gives its weight to none.

    Loss: E * sum_e c_e m_e, c the share of *first* choices (algorithm 1, lines 11-13; as the paper prints it, E^2
    smaller). In use all second choices are taken.

    Implementations: the second choice is kept by its weight in Mesh TensorFlow (g_2 / 0.2, in use too), and if asked in
    fairseq's MoE code (as here) and in fastmoe (after places are given out); DeepSpeed, and fairseq as it comes, draw
    it with Gumbel noise and keep it: `sampled`. Mesh TensorFlow divides by g_1 + g_2 before it drops, as the paper and
    this do; DeepSpeed, fairseq and transformers' NLLB as they come after that: `shared`. NLLB, told to divide before
    and to keep the second by chance, weighs it by p_2 itself. Room is 2 T / E, rounded up in DeepSpeed and here, down
    in fastmoe; fairseq has twice T / E rounded up, Mesh TensorFlow 1.25 T / E in training, of groups of 1024 tokens.
    Here the group is everything that is routed. The loss is the same in all, except that fastmoe's factor counts the
    experts of one process alone.
    """

    Options = GShardOptions

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k, normalize=True)
        loss = None
        if context.training:
            loss = options.aux_loss * load_balancing(wide(scores_TE).softmax(-1), index_TK[:, :1])
            loss = loss + options.z_loss * z_loss(scores_TE)
            if options.sampled:
                index_TK, weight_TK = self._sampled(wide(scores_TE), index_TK[:, :1], context)
            else:
                drawn_TK = options.second * uniform(weight_TK.shape, weight_TK, context) < weight_TK
                drawn_TK[:, 0] = True
                index_TK = torch.where(drawn_TK, index_TK, NO_EXPERT)
        room_TK = None
        factor = options.capacity_factor if context.training else options.eval_capacity_factor
        if factor:
            room_TK = kept(
                index_TK, self.num_experts, capacity(len(scores_TE), self.num_experts, options.top_k, factor / 2)
            )
        if options.shared:
            there_TK = index_TK != NO_EXPERT if room_TK is None else room_TK & (index_TK != NO_EXPERT)
            own_TK = weight_TK * there_TK
            weight_TK = own_TK / own_TK.sum(1, keepdim=True).clamp(min=torch.finfo(own_TK.dtype).eps)
        return routing(index_TK, weight_TK, room_TK, loss)

    def _sampled(self, scores_TE: Tensor, first_T1: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The first choice and draws of others [T, K], and their probabilities over their sum."""
        noisy_TE = scores_TE.detach() + gumbel_like(scores_TE, context.generator)
        others_TE = noisy_TE.scatter(1, first_T1, -math.inf)
        index_TK = torch.cat([first_T1, top(others_TE, self.options.top_k - 1)], 1)
        return index_TK, scores_TE.gather(1, index_TK).softmax(1)
