"""Noisy top-k gating (arXiv 1701.06538, section 2.1 and appendix A): the first sparse gate of deep learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.losses import squared_cv
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class NoisyTopKOptions(Options):
    """The paper's values.

    Attributes:
        top_k: experts per token, 4 in the paper's language models.
        importance_loss: coefficient of the squared CV of the summed gates.
        aux_loss: coefficient of the squared CV of the load, smoothed by the noise.
        noise_floor: least standard deviation of the noise (0.01 in Tensor2Tensor, none in the paper).
        init: standard deviation of the gate's first weights: 0, so that noise alone spreads the first tokens.
    """

    top_k: int = 4
    importance_loss: float = 0.1
    aux_loss: float = 0.1
    noise_floor: float = 0.01
    init: float = 0.0


class NoisyTopK(Router):
    """H = x W_g + N(0, 1) * softplus(x W_n) (eq. 4); G = softmax of the k largest of H (eq. 3, 5).

    Losses: w_i CV(sum_x G(x))^2 (eq. 6-7) and w_l CV(sum_x P(x))^2 (eq. 10-11), P_i = Phi((x W_g - t_i) / noise's
    deviation) with t_i the k-th largest of H without i (eq. 8-9). Both matrices start at zero.

    Implementations: Tensor2Tensor (`expert_utils.py`), laekov/fastmoe (`noisy_gate.py`) and
    davidmrau/mixture-of-experts have the same gate, and add 0.01 to the noise's deviation, which the paper does not
    (`noise_floor`). The CV is over the population in Tensor2Tensor and here, over a sample, E / (E - 1) times as much,
    in the other two, which add both losses up under one coefficient. davidmrau's mixes experts in log space: log sum_e
    G_e exp(y_e).
    """

    Options = NoisyTopKOptions

    def make_gate(self, hidden_size: int) -> None:
        """W_g and W_n."""
        init = self.options.init
        self.weight = nn.Parameter(init * torch.randn(self.num_experts, hidden_size))
        self.noise = nn.Parameter(init * torch.randn(self.num_experts, hidden_size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; noise and losses in training, for which the context holds the hidden states.

        Raises:
            ValueError: training without hidden states or without a gate: the noise is computed from them.
        """
        clean_TE, k = wide(scores_TE), self.options.top_k
        if not context.training:
            index_TK = top(clean_TE, k)
            return routing(index_TK, clean_TE.gather(1, index_TK).softmax(-1))
        if context.hidden_TD is None or self.hidden_size is None:
            raise ValueError("noisy top-k gating computes its noise from hidden states: give them, and hidden_size")
        noise_TE = nn.functional.linear(wide(context.hidden_TD), wide(self.noise))
        deviation_TE = nn.functional.softplus(noise_TE) + self.options.noise_floor
        noisy_TE = clean_TE + deviation_TE * torch.empty_like(clean_TE).normal_(generator=context.generator)
        order_TE = top(noisy_TE, k + 1)
        index_TK = order_TE[:, :k]
        weight_TK = noisy_TE.gather(1, index_TK).softmax(-1)
        gate_TE = torch.zeros_like(clean_TE).scatter(1, index_TK, weight_TK)
        loss = self.options.importance_loss * squared_cv(gate_TE.sum(0))
        if k < self.num_experts:  # else all are in the top k for sure
            ranked_TE = noisy_TE.gather(1, order_TE)
            threshold_TE = torch.where(noisy_TE > ranked_TE[:, k:], ranked_TE[:, k:], ranked_TE[:, k - 1 : k])
            chance_TE = torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE)
            loss = loss + self.options.aux_loss * squared_cv(chance_TE.sum(0))
        return routing(index_TK, weight_TK, None, loss)
