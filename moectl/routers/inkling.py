"""Inkling's router: the shared experts stand in the gate too, and share the weights with the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.bias import step_towards_mean
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class InklingOptions(Options):
    """The values of transformers.

    Attributes:
        top_k: routed experts per token.
        shared_experts: rows of the gate, after the routed experts', of experts that are always on.
        scale: what a token's weights add up to, those of the shared experts included.
        bias_rate: step of the selection bias after each step of training; how the model's own was trained is not known.
    """

    top_k: int = 6
    shared_experts: int = 2
    scale: float = 8.0
    bias_rate: float = 0.001


class Inkling(Router):
    """The K routed experts of largest sigmoid(z) + b; weights sigmoid(z) over the sum of the K and the shared ones,
    times `scale` and a learnt number. Experts from `num_experts` on are the shared ones, in the last columns.

    Scores as wide as `num_experts` have no shared experts. There is no paper: the formula is transformers'.

    Implementations: transformers, vLLM, NeMo Automodel and others are the same; they divide in logarithms, as this
    does, so that sigmoids may all be 0 in float32. SGLang can have a softmax gate too, normalise before the choice, or
    leave the shared experts out of it, which the checkpoint does not ask for. None says how the bias was trained: the
    step here is DeepSeek-V3's.
    """

    Options = InklingOptions
    bias: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: InklingOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.reach = num_experts + self.options.shared_experts
        self.global_scale = nn.Parameter(torch.ones(1))
        self.register_buffer("bias", torch.zeros(num_experts))

    @property
    def active(self) -> float:
        """Those that are always on besides."""
        return float(self.options.top_k + self.options.shared_experts)

    def make_gate(self, hidden_size: int) -> None:
        """A row for each routed and each shared expert."""
        rows = self.num_experts + self.options.shared_experts
        self.weight = nn.Parameter(hidden_size**-0.5 * torch.randn(rows, hidden_size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, from scores of routed experts and shared ones after them."""
        scores_TE = wide(scores_TE)
        affinity_TE = scores_TE[:, : self.num_experts].detach().sigmoid()
        chosen_TK = top(affinity_TE + self.bias.to(affinity_TE), self.options.top_k)
        shared_S = torch.arange(self.num_experts, scores_TE.shape[1], device=chosen_TK.device)
        index_TK = torch.cat([chosen_TK, shared_S.expand(len(chosen_TK), -1)], 1)
        share_TK = nn.functional.logsigmoid(scores_TE.gather(1, index_TK)).softmax(1)
        return routing(index_TK, self.options.scale * wide(self.global_scale) * share_TK)

    def after_step(self, load_E: Tensor) -> None:
        """Move the bias of routed experts."""
        step_towards_mean(self.bias, load_E[: self.num_experts], self.options.bias_rate)
