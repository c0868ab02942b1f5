"""Soft MoE (arXiv 2308.00951): experts take mixtures of tokens, and tokens mixtures of what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.protocol import Context, Options, Router, Slots, wide


@dataclass(frozen=True, slots=True)
class SoftMoeOptions(Options):
    """Section 2.1.

    Attributes:
        top_k: says nothing: every token goes everywhere.
        slots: mixtures per expert and sequence.
    """

    top_k: int = 1
    slots: int = 1


class SoftMoe(Router):
    """Z = l2(X) (scale * l2(Phi)); D = softmax of Z over tokens, C = softmax of Z over slots; Y = C f(D' X) (eq. 1-3).

    Not causal: a slot mixes all tokens of its sequence, and no other's. With N sequences there are N times the slots,
    expert by expert, and within an expert sequence by sequence; what crosses sequences is 0.

    Implementations: the authors' google-research/vmoe (`projects/soft_moe/router.py`) is followed, norms included: x /
    sqrt(sum x^2 + 1e-6). Unless told how many, it makes as many slots as tokens, divided over the experts and rounded,
    and it can move Z by normal noise. lucidrains/soft-moe-pytorch takes RMS norms with a gain each in place of both l2
    and the scale, so that Z begins larger by a factor of the hidden size, and its slots mix the normalised tokens.
    """

    Options = SoftMoeOptions

    @property
    def active(self) -> float:
        """All."""
        return float(self.num_experts)

    def make_gate(self, hidden_size: int) -> None:
        """A key for each slot of each expert, and the scale."""
        slots = self.num_experts * self.options.slots
        self.key_DS = nn.Parameter(torch.empty(hidden_size, slots))
        nn.init.normal_(self.key_DS, std=hidden_size**-0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Logits of tokens and slots [T, S], before slots are those of a sequence."""
        return unit(wide(hidden_TD), 1) @ (wide(self.scale) * unit(wide(self.key_DS), 0))

    def route(self, scores_TS: Tensor, context: Context) -> Slots:  # type: ignore[override]  # slots, and no experts
        """The mixtures; there is no loss."""
        scores_TS = wide(scores_TS)
        if context.sequence_T is not None:
            E, T = self.num_experts, len(scores_TS)
            number_N = torch.arange(int(context.sequence_T[-1]) + 1, device=scores_TS.device)
            other_TN = context.sequence_T[:, None] != number_N
            scores_TENP = scores_TS.view(T, E, 1, -1).expand(-1, -1, len(number_N), -1)
            scores_TS = scores_TENP.masked_fill(other_TN[:, None, :, None], -math.inf).reshape(T, -1)
        return Slots(scores_TS.softmax(0), scores_TS.softmax(1), scores_TS.new_zeros(()))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Of length 1 along a dimension."""
    return vectors * (vectors.square().sum(dim, keepdim=True) + 1e-6).rsqrt()
