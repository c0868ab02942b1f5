"""Yuan 2.0-M32 (arXiv 2405.17976): the attention router, in which the experts of one token attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class YuanOptions(Options):
    """Of the released model.

    Attributes:
        normalize: whether the weights of the chosen are divided by their sum.
        aux_loss: coefficient of the balancing loss.
    """

    normalize: bool = True
    aux_loss: float = 0.01


class Yuan(Router):
    """r = softmax_rows(q k^T) v with q, k, v = W h in R^E each; p = softmax(r), and its top k (section 3.1, number from
    memory).

    Attention is over the E x E products of one token's q and k, without a scale.

    Implementations: those of the release (IEIT-Yuan/Yuan2.0-M32) disagree. Its vLLM port, and a later transformers
    class, have it so (with the softmax over the chosen r, which is the same). Its Megatron class is another function:
    experts are the sequence, heads split the *positions* of the text, so that tokens are mixed, and products are
    divided by the root of a head's size; its first transformers class splits positions into heads as well.
    """

    Options = YuanOptions

    def make_gate(self, hidden_size: int) -> None:
        """q, k and v in one matrix."""
        self.weight = nn.Parameter(torch.empty(3 * self.num_experts, hidden_size).normal_(std=hidden_size**-0.5))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits r [T, E]."""
        query_TE, key_TE, value_TE = super().score(hidden_TD, context).chunk(3, dim=-1)
        attention_TEE = (query_TE[:, :, None] * key_TE[:, None, :]).softmax(-1)
        return (attention_TEE @ value_TE[:, :, None])[..., 0]

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice from logits."""
        options = self.options
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(scores_TE, options.top_k)
        weight_TK = probability_TE.gather(1, index_TK)
        if options.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        loss = options.aux_loss * load_balancing(probability_TE, index_TK) if context.training else None
        return routing(index_TK, weight_TK, aux_loss=loss)
