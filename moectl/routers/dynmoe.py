"""DynMoE (arXiv 2405.14297): top-any gating, where each expert has a threshold of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class DynMoeOptions(Options):
    """One that matters.

    Attributes:
        top_k: of no effect: as many experts as pass their threshold.
        aux_loss: coefficient of the loss that keeps experts apart and short; its value is from memory.
    """

    top_k: int = 1
    aux_loss: float = 0.01


class DynMoe(Router):
    """Expert e works where sigmoid(cos(h, w_e)) > sigmoid(G_e), over 1 / (how many do); in use at least the top one.

    A token that passes no threshold goes nowhere in training. The step has the gradient of relu(sigmoid(cos) -
    sigmoid(G)), which is none for experts that do not work; so the weight is 1 / k, and its gradient is not. The loss
    is ||C - 1||_F + mean_e ||w_e||, with C the cosines of experts (eq. 8, as others number it). The growing and culling
    of experts during training (algorithm 1) is not routing.

    Implementations: the release (LINs-lab/DynMoE), a fork of DeepSpeed, is followed in the gate, its gradient and what
    a token without experts gets in use. It multiplies cosines and thresholds by a temperature, which it sets to 1 and
    does not train. Its later revision adds the balancing loss and the mean of the gates: not here.
    """

    Options = DynMoeOptions

    @property
    def active(self) -> None:
        """As many as a token asks for."""
        return None

    def make_gate(self, hidden_size: int) -> None:
        """Orthogonal experts, thresholds 0: half of all directions pass."""
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.num_experts, hidden_size)))
        self.threshold = nn.Parameter(torch.zeros(self.num_experts))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Sigmoids of cosines [T, E]."""
        return linear(normalize(wide(hidden_TD), dim=-1), normalize(wide(self.weight), dim=-1)).sigmoid()

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """All experts that pass, the most similar first."""
        margin_TE = (scores_TE - wide(self.threshold).sigmoid()).relu()
        index_TE = top(scores_TE, self.num_experts)
        passes_TE, margin_TE = (margin_TE > 0).gather(1, index_TE), margin_TE.gather(1, index_TE)
        if not context.training:
            # Experts are in the order of similarity, not of margins, so the first may fail where another passes.
            passes_TE[:, 0] |= ~passes_TE.any(1)
        count_T1 = passes_TE.sum(1, keepdim=True).clamp(min=1)
        weight_TE = (passes_TE + margin_TE - margin_TE.detach()) / count_T1
        loss = self.options.aux_loss * self._apart() if context.training else None
        return routing(index_TE.masked_fill(~passes_TE, NO_EXPERT), weight_TE, aux_loss=loss)

    def _apart(self) -> Tensor:
        unit_ED = normalize(wide(self.weight), dim=-1)
        cosine_EE = unit_ED @ unit_ED.t()
        apart = (cosine_EE - torch.eye(self.num_experts).to(cosine_EE)).square().sum()
        # The root of 0, where all experts are orthogonal, has no gradient.
        return (apart + 1e-12).sqrt() + wide(self.weight).norm(dim=-1).mean()
