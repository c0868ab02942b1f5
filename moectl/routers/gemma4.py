"""Gemma 4's router: a normalised input, a softmax, and a learnt scale for each expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


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

    There is no paper: the formula is transformers' (`Gemma4TextRouter`), whose router returns p where others do logits.

    Implementations: transformers, TensorRT-LLM, MLX ports and others take the same steps. They round to the model's
    type between the norm and the softmax; here all of it is in float32.
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
        index_TK, weight_TK = choose(scores_TE, self.options.top_k, normalize=True)
        loss = None
        if context.training:
            loss = self.options.aux_loss * load_balancing(wide(scores_TE).softmax(-1), index_TK)
        return routing(index_TK, weight_TK * wide(self.per_expert_scale)[index_TK], None, loss)
