"""MoE++ (arXiv 2410.07348): experts that are nothing, a copy or a constant, beside those that compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.capacity import places
from moectl.routers.protocol import Context, Options, Router, Routing, counts, routing, top, wide


@dataclass(frozen=True, slots=True)
class MoePlusPlusOptions(Options):
    """The paper's values.

    Attributes:
        constant_experts: those that return a mix of the token and a learnt vector; a copy and a zero expert follow.
        tau: how much of an expert that computes one that does not is worth, in the loss and in the room.
        capacity_factor: of the room in training (gamma); 0: no limit.
        aux_loss: coefficient of the balancing loss (beta).
        normalize: whether weights are divided by their sum.
    """

    constant_experts: int = 2
    tau: float = 0.75
    capacity_factor: float = 1.1
    aux_loss: float = 0.01
    normalize: bool = True


class MoePlusPlus(Router):
    """The k best of a softmax; the zero expert's weight is 0, the others' are divided by their sum. Experts from
    `num_experts` on are, in this order, the constant ones, the copy and the zero expert (sections 3.1-3.3, numbers from
    memory).

    In training the loss sum_i eta_i f_i P_i, eta 1 for experts that compute and tau for others, and room gamma tau k T
    / (tau N + Z) for the first and gamma k T / (tau N + Z) for the others, which is from memory: the released code
    drops nothing. The gate of the layer before, which the paper adds to this one's scores, is the model's to add.
    Scores as wide as `num_experts` have only experts that compute.

    Implementations: one is known, the authors' SkyworkAI/MoE-plus-plus, for use and not for training. It divides the
    weights by their sum, which the paper does not (from memory; `normalize=False`), and gives experts the token times k
    unless `moe_feature_no_mul_topk` is set, so that copies are copies of k x: whoever builds the layer does that. Its
    gate is, by default, two matrices with a tanh between them; `moe_use_mixtral_gating` leaves the zero expert its
    weight.
    """

    Options = MoePlusPlusOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: MoePlusPlusOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.reach = num_experts + self.options.constant_experts + 2

    @property
    def active(self) -> float:
        """Those that compute, by their share of the room, which the loss balances experts for."""
        options, computing = self.options, self.options.tau * self.num_experts
        return float(options.top_k * computing / (computing + self.reach - self.num_experts))

    def make_gate(self, hidden_size: int) -> None:
        """A row for each expert of every kind."""
        rows = self.num_experts + self.options.constant_experts + 2
        self.weight = nn.Parameter(hidden_size**-0.5 * torch.randn(rows, hidden_size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, from scores of computing, constant, copy and zero experts; loss and room in training."""
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(scores_TE, self.options.top_k)
        weight_TK = probability_TE.gather(1, index_TK)
        weight_TK = torch.where(index_TK == self.reach - 1, torch.zeros_like(weight_TK), weight_TK)
        if self.options.normalize:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
        if not context.training:
            return routing(index_TK, weight_TK)
        return routing(index_TK, weight_TK, self._room(index_TK, scores_TE), self._loss(probability_TE, index_TK))

    def _computes(self, scores_TE: Tensor) -> Tensor:
        return torch.arange(scores_TE.shape[1], device=scores_TE.device) < self.num_experts

    def _room(self, index_TK: Tensor, scores_TE: Tensor) -> Tensor | None:
        factor, tau = self.options.capacity_factor, self.options.tau
        if not factor:
            return None
        unit = factor * index_TK.numel() / (tau * self.num_experts + scores_TE.shape[1] - self.num_experts)
        full, others = math.ceil(tau * unit), math.ceil(unit)
        room_TK = torch.where(self._computes(scores_TE)[index_TK], full, others)
        return places(index_TK, scores_TE.shape[1]) < room_TK

    def _loss(self, probability_TE: Tensor, index_TK: Tensor) -> Tensor:
        worth_E = torch.where(self._computes(probability_TE), 1.0, self.options.tau).to(probability_TE)
        frequency_E = counts(index_TK, len(worth_E)) / len(index_TK)
        return self.options.aux_loss * (worth_E * frequency_E * probability_TE.mean(0)).sum()
