"""Gemma 4's router: a normalised input, a softmax, and a learnt scale for each expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class Gemma4Options(Options):
    """The values of transformers.

    Attributes:
        top_k: experts per token.
        aux_loss: coefficient of the balancing loss; the model's own training is not published.
        epsilon: of the input's RMS norm.
    """

    top_k: int = 8
    aux_loss: float = 0.001
    epsilon: float = 1e-6


class Gemma4(Router):
    """p = softmax(W (RMSNorm(x) * s / sqrt(D))); the k best over their sum, times the expert's own scale.

    transformers' router returns p where others return logits.
    """

    Options = Gemma4Options

    def __init__(self, hidden_size: int | None, num_experts: int, options: Gemma4Options | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts))

    def make_gate(self, hidden_size: int) -> None:
        """A linear gate over scaled inputs."""
        super().make_gate(hidden_size)
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the normalised input [T, E]."""
        x_TD = wide(hidden_TD)
        x_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + self.options.epsilon).rsqrt()
        return super().score(x_TD * wide(self.scale) * x_TD.shape[-1] ** -0.5, context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the balancing loss."""
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(scores_TE, self.options.top_k)
        weight_TK = probability_TE.gather(1, index_TK)
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True) * wide(self.per_expert_scale)[index_TK]
        loss = self.options.aux_loss * load_balancing(probability_TE, index_TK) if context.training else None
        return routing(index_TK, weight_TK, None, loss)
