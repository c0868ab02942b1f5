"""StableMoE (arXiv 2204.08396): a router is learnt, distilled into one that looks at token ids alone, and frozen.

Legend: T tokens, D hidden, E experts, K choices, R size of the distilled router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.capacity import capacity, kept
from moectl.routers.protocol import Context, Options, Router, Routing, counts, routing, top, wide


@dataclass(frozen=True, slots=True)
class StableMoeOptions(Options):
    """Defaults of the released training command.

    Attributes:
        first_stage: share of the training in which routing is learnt; then it is frozen.
        aux_loss: coefficient of the balancing loss, in the first stage.
        distill: coefficient of the cross entropy of the distilled router against the choices of the learnt one.
        distilled_size: size of the distilled router's embeddings.
        vocab_size: how many token ids there are.
        capacity_factor: places per expert over tokens per expert; 0: no limit.
    """

    top_k: int = 1
    first_stage: float = 0.1
    aux_loss: float = 0.3
    distill: float = 0.3
    distilled_size: int = 50
    vocab_size: int = 50257
    capacity_factor: float = 2.0


class StableMoe(Router):
    """y = sigmoid(h . e_a) F_a(h), with a the greedy choice of h . e in the first stage, of the distilled router after
    (section 3, number from memory).

    First stage: the loss has sum_e (n_e - n) / n * sum of sigmoid(h . e_e) over the n_e tokens of expert e, with n the
    mean load, and the cross entropy of the distilled router, whose scores are products of a token's own embedding with
    centroids. Second stage, and use: the distilled router chooses, and gets no gradient; the weight is still sigmoid(h
    . e_a) of the learnt centroids, and these are still trained.

    Implementations: one is known, the authors' Hunter-DDM/stablemoe (`moe_layer.py`). Its losses are sums over tokens
    that the trainer divides by their number; here they are means. It rounds capacity down, here it is rounded up;
    tokens beyond it keep their hidden state; experts have a residual inside. In place of a token's own embedding it can
    distil the mean of two, a convolution over five, or a small transformer; such routers are not here.
    """

    Options = StableMoeOptions

    def make_gate(self, hidden_size: int) -> None:
        """Orthogonal centroids of norm 0.1, normal embeddings."""
        size = self.options.distilled_size
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.num_experts, hidden_size), gain=0.1))
        self.distilled_weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.num_experts, size), gain=0.1))
        self.embedding = nn.Parameter(torch.randn(self.options.vocab_size, size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice of the stage that the training is in."""
        if context.token_T is None:
            raise ValueError(f"{type(self).__name__} chooses by token ids, and the context has none")
        options, scores_TE = self.options, wide(scores_TE)
        learning = context.training and context.progress < options.first_stage
        embedded_TR = nn.functional.embedding(context.token_T, wide(self.embedding))
        distilled_TE = embedded_TR @ wide(self.distilled_weight).t()
        index_TK = top(scores_TE if learning else distilled_TE, options.top_k)
        weight_TK = scores_TE.gather(1, index_TK).sigmoid()
        room_TK = loss = None
        if options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor)
            room_TK = kept(index_TK, self.num_experts, room)
        if learning:
            balance = options.aux_loss * self._balance(index_TK, weight_TK)
            loss = balance + options.distill * nn.functional.cross_entropy(distilled_TE, index_TK[:, 0])
        return routing(index_TK, weight_TK, room_TK, loss)

    def _balance(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        load_E = counts(index_TK, self.num_experts).to(weight_TK)
        over_E = load_E / load_E.mean() - 1
        return (over_E[index_TK] * weight_TK).sum() / len(index_TK)
