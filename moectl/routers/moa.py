"""Mixture of Attention Heads (arXiv 2210.05144): experts are pairs of query and output projections of attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers.losses import load_balancing, z_loss
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class MoaOptions(Options):
    """The released training script.

    Attributes:
        top_k: heads per token.
        normalize: whether weights are divided by their sum, through which no gradient goes.
        aux_loss: coefficient of the balancing loss.
        z_loss: coefficient of the mean squared log-sum-exp.
    """

    top_k: int = 8
    normalize: bool = True
    aux_loss: float = 0.01
    z_loss: float = 0.001


class Moa(Router):
    """Top-k of p = softmax(W_g q); weight p_i / detach(sum of the chosen p) (section 3, number from memory).

    Keys and values are one and the same for all heads, so that only queries and outputs are routed.

    Implementations: the authors' yikangshen/MoA (`moe.py`) has the division commented out (`normalize=False`), takes
    noisy logits on request (as of `NoisyTopK`) and draws some of the choices by their probability on request; balance
    and z losses are as here, and a loss of the CV of the summed weights is left out. JetMoe in transformers takes the
    softmax of the chosen logits, which is equal in value to ours and has the gradient of the sum too.
    """

    Options = MoaOptions

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training both losses."""
        options = self.options
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(scores_TE, options.top_k)
        weight_TK = probability_TE.gather(1, index_TK)
        if options.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).detach()
        loss = None
        if context.training:
            balance = load_balancing(probability_TE, index_TK)
            loss = options.aux_loss * balance + options.z_loss * z_loss(scores_TE)
        return routing(index_TK, weight_TK, aux_loss=loss)
