"""Mixture of Nested Experts (arXiv 2407.19985): the most important tokens get the widest slice of one network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moectl.routers.protocol import Context, Options, Routing, routing, wide
from moectl.routers.sequences import lengths, ranks
from moectl.routers.single import Single


@dataclass(frozen=True, slots=True)
class MoneOptions(Options):
    """Sections 4.1 and 4.3.

    Attributes:
        effective_capacity: mean width over full width, expert e of E having 1 / 2**(E - 1 - e) of it.
        alpha: where the learned factor of the weights begins.
        entropy: how much evenness of the shares counts, the paper's beta.
        preference: how much wider experts count, the paper's delta.
    """

    top_k: int = 1
    effective_capacity: float = 0.6
    alpha: float = 0.0
    entropy: float = 10.0
    preference: float = 2.0


class Mone(Single):
    """Expert preferred routing (algorithm 1): from the widest expert to the narrowest, each takes its share of the
    tokens that are left, by r = softmax(W h + b); those that rounding leaves over get the narrowest. The weight is
    alpha * r + 1 (eq. 1).

    Not causal: tokens of a sequence compete. Expert 0 is the narrowest. The paper routes once, in the first layer, for
    all layers. Eq. 3, printed with c_i over delta^(i-1), is maximised with c_i * delta^(i-1), as its text has it (wider
    ones are to be preferred).

    Implementations: the authors' code is not public (from memory). usryokousha/mone-pytorch (`routing.py`) has this
    rule and these shares, and departs from them in use: alpha begins at 1; positions that one sequence of a batch chose
    are marked in all of its sequences; and its widths fall with an expert's number, while its last expert chooses
    first.
    """

    Options = MoneOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: MoneOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        options = self.options
        self.share = shares(num_experts, options.effective_capacity, options.entropy, options.preference)
        self.alpha = nn.Parameter(torch.tensor(options.alpha))

    def make_gate(self, hidden_size: int) -> None:
        """With a bias."""
        super().make_gate(hidden_size)
        self.bias = nn.Parameter(torch.zeros(self.num_experts))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E]."""
        return super().score(hidden_TD, context) + wide(self.bias)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; there is no loss."""
        probability_TE = wide(scores_TE).softmax(-1)
        length_T = lengths(context.sequence_T, probability_TE[:, 0])
        expert_T = torch.zeros_like(length_T)
        left_T = torch.ones_like(length_T, dtype=torch.bool)
        for expert in reversed(range(self.num_experts)):
            value_T = probability_TE[:, expert].masked_fill(~left_T, -math.inf)
            taken_T = left_T & (ranks(value_T, context.sequence_T) < (length_T.double() * self.share[expert]).floor())
            expert_T = torch.where(taken_T, expert, expert_T)
            left_T = left_T & ~taken_T
        index_T1 = expert_T[:, None]
        return routing(index_T1, wide(self.alpha) * probability_TE.gather(1, index_T1) + 1)


def shares(num_experts: int, effective_capacity: float, entropy: float = 10.0, preference: float = 2.0) -> list[float]:
    """Each expert's share of the tokens: the c that maximises sum c_i delta^i - beta sum c_i log c_i with sum c_i = 1
    and sum c_i d_i = the effective capacity, d_i = 2**(i + 1 - E): softmax((delta^i + m d_i) / beta) with the right m.

    Raises:
        ValueError: no shares have that mean width.
    """
    number_E = np.arange(num_experts, dtype=np.float64)
    width_E, liking_E = 2.0 ** (number_E + 1 - num_experts), preference**number_E
    if not width_E[0] < effective_capacity < 1:
        raise ValueError(f"effective_capacity is {effective_capacity}, and lies between {width_E[0]} and 1")

    def at(multiplier: float) -> np.ndarray:
        logit_E = (liking_E + multiplier * width_E) / entropy
        share_E = np.exp(logit_E - logit_E.max())
        return share_E / share_E.sum()

    low, high = -1.0, 1.0
    while at(low) @ width_E > effective_capacity:
        low *= 2
    while at(high) @ width_E < effective_capacity:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) @ width_E > effective_capacity else (middle, high)
    return [float(share) for share in at(low)]
