"""Mixture-of-Depths (arXiv 2404.02258): which tokens of a sequence pass through a block, and which around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.protocol import NO_EXPERT, Context, Options, Routing, routing, wide
from moectl.routers.sequences import lengths, ranks
from moectl.routers.single import Single

DECIDE = ("top", "threshold", "predictor")


@dataclass(frozen=True, slots=True)
class ModOptions(Options):
    """Section 3.

    Attributes:
        share: of a sequence's tokens that pass through.
        decide: in use, by what (section 3.5): `top`, as in training, which looks ahead; `threshold`, sigmoid(r) > 1/2,
            where training pushes r to either side; `predictor`, a second gate that learns the choice and nothing else.
        aux_loss: coefficient of the cross entropy that teaches the latter two what was chosen.
        sigmoid: whether the weight is sigmoid(r), in (0, 1), in place of r.
    """

    top_k: int = 1
    share: float = 0.125
    decide: str = "top"
    aux_loss: float = 0.01
    sigmoid: bool = False


class Mod(Single):
    """r = w . h; x + r * f(x) for the tokens with the largest r of their sequence, x for all others (eq. 1).

    Expert 0 is the block, NO_EXPERT the way around it; further experts are never chosen. r is no probability: it may be
    of any sign. The share's tokens are rounded up. The predictor is a hidden layer of half the width over detached
    hidden states; the paper does not say how large its own is, nor how the loss is weighted.

    Implementations: the authors' code was not found, and others disagree. sramshetty/mixture-of-depths, which has that
    predictor, multiplies the block's MLP, and not its attention, by sigmoid(r) (`sigmoid`), and adds what comes out,
    residual and all, to the token once more. astramind-ai/Mixture-of-depths multiplies the block's output, residual and
    all, by r, has a gate with a bias, rounds the share down, lets it fall from 1 to 1/8 in training, and passes tokens
    above the smallest of the chosen r alone, which is one fewer.
    """

    Options = ModOptions
    reach = 1

    def __init__(self, hidden_size: int | None, num_experts: int, options: ModOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.decide not in DECIDE or not 0 < self.options.share <= 1:
            raise ValueError(f"{self.options}: decide is one of {', '.join(DECIDE)}, and share in (0, 1]")

    @property
    def active(self) -> float:
        """The one block, for a share of the tokens."""
        return float(self.options.share)

    def make_gate(self, hidden_size: int) -> None:
        """One row; and the predictor, if that decides."""
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        if self.options.decide == "predictor":
            half = max(1, hidden_size // 2)
            self.predictor = nn.Sequential(nn.Linear(hidden_size, half), nn.SiLU(), nn.Linear(half, 1))

    def route(self, scores_T1: Tensor, context: Context) -> Routing:
        """Through or around; in training the loss of what is to decide in use."""
        options, scores_T1 = self.options, wide(scores_T1)
        decision_T = scores_T1[:, 0]
        if options.decide == "predictor":
            if context.hidden_TD is None:
                raise ValueError("the predictor decides by hidden states, and the context has none")
            decision_T = self.predictor(context.hidden_TD.detach().to(self.weight))[:, 0]
        loss = None
        if context.training or options.decide == "top":
            room_T = (lengths(context.sequence_T, scores_T1[:, 0]).double() * options.share).ceil()
            through_T = ranks(scores_T1[:, 0], context.sequence_T) < room_T
            if context.training and options.decide != "top":
                wanted_T = through_T.to(decision_T.dtype)
                loss = options.aux_loss * nn.functional.binary_cross_entropy_with_logits(decision_T, wanted_T)
        else:
            through_T = decision_T > 0
        index_T1 = torch.where(through_T, 0, NO_EXPERT)[:, None]
        return routing(index_T1, scores_T1.sigmoid() if options.sigmoid else scores_T1, aux_loss=loss)
