"""GRIN (arXiv 2409.12136): SparseMixer-v2, which samples experts and estimates the gradient of having sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.losses import load_balancing
from moectl.routers.noise import gumbel_like, jittered, uniform
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class GrinOptions(Options):
    """The values of Phi-3.5-MoE.

    Attributes:
        threshold: experts i with (max - z_i) / max(|z_i|, max) > 2 * threshold are out of the question (the released
            code's `router_jitter_noise`).
        jitter: training multiplies what the gate is given by U(1 - jitter, 1 + jitter).
        aux_loss: coefficient of the balancing loss.
    """

    threshold: float = 0.01
    jitter: float = 0.01
    aux_loss: float = 0.01


class Grin(Router):
    """k times: mask what is far below the largest logit, draw from the masked softmax (in use: its argmax), weigh with
    that softmax at the drawn one, and ban it (section 3; number from memory). Weights are not normalised, and can sum
    to k.

    Heun's third order estimator (arXiv 2310.00811): where another than the argmax was drawn, the weight is a third of
    itself with probability 3/4, while the gradient stays that of the whole weight.

    Implementations: transformers' Phimoe trains and serves; vLLM and SGLang serve alone, with the threshold fixed at
    0.01. All take two experts, whatever number the configuration has; here any. transformers writes 0.3333 for the
    third.
    """

    Options = GrinOptions

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss."""
        z_TE = open_TE = wide(scores_TE)
        index, weight = [], []
        for _ in range(self.options.top_k):
            index_T1, weight_T1 = self._one(z_TE, open_TE, context)
            index.append(index_T1)
            weight.append(weight_T1)
            open_TE = open_TE.scatter(1, index_T1, -math.inf)
        index_TK = torch.cat(index, 1)
        loss = self.options.aux_loss * load_balancing(z_TE.softmax(-1), index_TK) if context.training else None
        return routing(index_TK, torch.cat(weight, 1), None, loss)

    def _one(self, z_TE: Tensor, open_TE: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """One choice and its weight [T, 1]."""
        with torch.no_grad():
            best_T1 = open_TE.amax(1, keepdim=True)
            far_TE = (best_T1 - z_TE) / torch.maximum(z_TE.abs(), best_T1) > 2 * self.options.threshold
        logit_TE = open_TE.masked_fill(far_TE, -math.inf)
        likely_T1 = open_TE.argmax(1, keepdim=True)
        probability_TE = logit_TE.softmax(-1)
        if not context.training:
            return likely_T1, probability_TE.gather(1, likely_T1)
        index_T1 = (logit_TE.detach() + gumbel_like(logit_TE, context.generator)).argmax(1, keepdim=True)
        weight_T1 = probability_TE.gather(1, index_T1)
        whole_T1 = (index_T1 == likely_T1) | (uniform(index_T1.shape, z_TE, context) > 0.75)
        estimate_T1 = torch.where(whole_T1, 1.0, 1 / 3) * weight_T1.detach()
        return index_T1, weight_T1 + (estimate_T1 - weight_T1).detach()
