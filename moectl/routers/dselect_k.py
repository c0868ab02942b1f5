"""DSelect-k (arXiv 2106.03760): k selectors, each a smooth binary code of an expert: differentiable, sparse in the end.

Legend: T tokens, D hidden, E experts, K selectors, M bits of an expert's number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide
from moectl.routers.ranking import ranked


@dataclass(frozen=True, slots=True)
class DSelectKOptions(Options):
    """Defaults of the released code.

    Attributes:
        top_k: selectors: how many experts a token has at most once all codes are binary.
        gamma: width of the smooth-step: a bit is 0 below -gamma/2 and 1 above gamma/2.
        entropy: coefficient of the entropy of the selectors, which drives them to one expert each.
    """

    gamma: float = 1.0
    entropy: float = 1e-6


class DSelectK(Router):
    """q = sum_j softmax(a)_j r(z^j), with r(z)_i a product over bits b: of S(z_b) where i has it, else 1 - S(z_b).

    S(t) = -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2 between 0 and 1 (section 3; number from memory). a and z are linear
    in the hidden state (the paper's per-example gate; its static gate has them as parameters). Where E is no power of
    2, some codes name no expert: the weights sum to less than 1, and 1 / sum_i r(z)_i, of each selector, is added to
    the loss.

    Implementations: the authors' Keras layer (google-research `dselect_k_moe`) sums both penalties over the tokens of a
    batch, and has none of entropy unless one is passed; here they are means over tokens, so that coefficients do not
    depend on its size. LibMTL's port has an entropy of 1e-6 always; where E is no power of 2 it bounds the second
    penalty, divides both by tokens and selectors, and takes 1 off. The gate is the same in all.
    """

    Options = DSelectKOptions

    @property
    def bits(self) -> int:
        """M."""
        return (self.num_experts - 1).bit_length()

    def make_gate(self, hidden_size: int) -> None:
        """Codes start near the middle of the smooth-step, where all experts have weight."""
        selectors, code = self.options.top_k, self.options.gamma / 100
        self.code_weight = nn.Parameter(torch.empty(selectors * self.bits, hidden_size).uniform_(-code, code))
        self.code_bias = nn.Parameter(torch.empty(selectors * self.bits).uniform_(-code, code))
        self.weight = nn.Parameter(torch.empty(selectors, hidden_size).uniform_(-0.05, 0.05))
        self.bias = nn.Parameter(torch.empty(selectors).uniform_(-0.05, 0.05))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Codes, then logits of selectors [T, K * M + K]."""
        weight = torch.cat([wide(self.code_weight), wide(self.weight)])
        return nn.functional.linear(wide(hidden_TD), weight, torch.cat([wide(self.code_bias), wide(self.bias)]))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The experts of which the weight is not 0, and in training the penalties."""
        options, T = self.options, len(scores_TE)
        code_TKM = scores_TE[:, : -options.top_k].reshape(T, options.top_k, self.bits)
        bit_TKM = smooth_step(wide(code_TKM), options.gamma)
        selected_TKE = bit_TKM.new_ones(T, options.top_k, 1)
        for bit_TK in bit_TKM.unbind(-1):  # the highest first: what is known of a number doubles with each
            both_TK2 = torch.stack([1 - bit_TK, bit_TK], -1)
            selected_TKE = (selected_TKE[..., None] * both_TK2[..., None, :]).flatten(2)
        selected_TKE = selected_TKE[..., : self.num_experts]
        share_TK = wide(scores_TE[:, -options.top_k :]).softmax(-1)
        index_TE, weight_TE = ranked((share_TK[..., None] * selected_TKE).sum(1))
        loss = None
        if context.training:
            loss = -options.entropy * (selected_TKE * (selected_TKE + 1e-6).log()).sum((1, 2)).mean()
            if self.num_experts != 1 << self.bits:
                loss = loss + (1 / selected_TKE.sum(2)).sum(1).mean()
        return routing(index_TE, weight_TE, aux_loss=loss)


def smooth_step(value: Tensor, gamma: float) -> Tensor:
    """A cubic from 0 at -gamma/2 to 1 at gamma/2, with slope 0 at both (arXiv 2002.07772)."""
    inside = (value / gamma).clamp(-0.5, 0.5)  # in this form both ends are exact, so that experts do go away
    return -2 * inside**3 + 1.5 * inside + 0.5
