"""LongCat-Flash (arXiv 2509.01322): experts that return their input, so that easy tokens cost less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class LongCatOptions(Options):
    """The values of the released model.

    Attributes:
        top_k: experts per token, those that compute nothing included.
        zero_experts: experts after the others that return their input.
        active: how many experts that compute a token is to have in the mean (K_e).
        scale: of the weights.
        bias_rate: step of the selection bias, times the missing share of all assignments (mu); the report gives none.
    """

    top_k: int = 12
    zero_experts: int = 256
    active: float = 8.0
    scale: float = 6.0
    bias_rate: float = 0.001


class LongCat(Router):
    """The K best softmax(z) + b, weights the plain softmax times 6. Experts from `num_experts` on return their input.

    After a step b_i += mu (K_e / (K N) - its share of all assignments) for experts that compute, 0 for the others
    (section 2.1.1). The report's loss over devices is left out: no source at hand. Scores as wide as `num_experts`
    have no zero experts.
    """

    Options = LongCatOptions
    bias: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: LongCatOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.reach = num_experts + self.options.zero_experts
        self.register_buffer("bias", torch.zeros(self.reach))

    def make_gate(self, hidden_size: int) -> None:
        """A row for each expert, zero experts included."""
        rows = self.num_experts + self.options.zero_experts
        self.weight = nn.Parameter(hidden_size**-0.5 * torch.randn(rows, hidden_size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, from scores of computing experts and zero experts after them."""
        probability_TE = wide(scores_TE).softmax(-1)
        bias_E = self.bias[: scores_TE.shape[1]].to(probability_TE)
        index_TK = top(probability_TE.detach() + bias_E, self.options.top_k)
        return routing(index_TK, self.options.scale * probability_TE.gather(1, index_TK))

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move the bias of computing experts towards `active` of them per token."""
        options = self.options
        share_E = load_E.to(self.bias) / load_E.sum().clamp(min=1)
        wanted = options.active / options.top_k / self.num_experts
        self.bias[: self.num_experts] += options.bias_rate * (wanted - share_E[: self.num_experts])
