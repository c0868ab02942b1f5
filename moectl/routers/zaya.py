"""Zaya's router: a small MLP, a bias, and one more class that skips the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.bias import step_towards_mean
from moectl.routers.choice import choose
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class ZayaOptions(Options):
    """The values of transformers.

    Attributes:
        top_k: experts per token; the released model has 1.
        router_size: width of the MLP.
        epsilon: of its RMS norm.
        skip_bias: first bias of the class that skips.
        bias_rate: step of the selection bias after each step of training; how the model's own was trained is not known.
    """

    top_k: int = 1
    router_size: int = 256
    epsilon: float = 1e-5
    skip_bias: float = -1.0
    bias_rate: float = 0.001


class Zaya(Router):
    """z = W_3 gelu(W_2 gelu(W_1 RMSNorm(W_0 x))) over E experts and a skip; the k best softmax(z) + b, weights the
    plain softmax; a token that skips goes nowhere. There is no paper of it at hand.

    As the first layer of the model: later ones add the W_0 x of the layer before, which a router that is asked alone
    does not have. Scores as wide as `num_experts` have no skip.

    Implementations: one was read, transformers' class, and ours equals it; it names expert 0 with weight 0 where a
    token skips. How the biases were trained is not public there.
    """

    Options = ZayaOptions
    bias: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: ZayaOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.register_buffer("bias", torch.zeros(num_experts + 1))
        self.bias[-1] = self.options.skip_bias

    def make_gate(self, hidden_size: int) -> None:
        """The four matrices and the norm's scale."""
        width = self.options.router_size
        self.down_proj = nn.Linear(hidden_size, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.out_proj = nn.Linear(width, self.num_experts + 1, bias=False)

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Logits of the experts and the skip [T, E + 1]."""
        x_TR = _linear(self.down_proj, wide(hidden_TD))
        x_TR = wide(self.norm) * x_TR * (x_TR.square().mean(-1, keepdim=True) + self.options.epsilon).rsqrt()
        for layer in (self.fc1, self.fc2):
            x_TR = nn.functional.gelu(_linear(layer, x_TR))
        return _linear(self.out_proj, x_TR)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, from scores of the experts and the skip after them."""
        index_TK, weight_TK = choose(scores_TE, self.options.top_k, bias_E=self.bias[: scores_TE.shape[1]])
        return routing(torch.where(index_TK == self.num_experts, NO_EXPERT, index_TK), weight_TK)

    def after_step(self, load_E: Tensor) -> None:
        """Move the experts' biases; that of the skip stays."""
        step_towards_mean(self.bias[: self.num_experts], load_E, self.options.bias_rate)


def _linear(layer: nn.Linear, x_TD: Tensor) -> Tensor:
    """In float32 or wider, whatever the layer's type."""
    return nn.functional.linear(x_TD, wide(layer.weight), None if layer.bias is None else wide(layer.bias))
