"""SwitchHead (arXiv 2312.07987): in each attention head, experts for the value projection and for the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.noise import uniform
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class SwitchHeadOptions(Options):
    """The released layer.

    Attributes:
        top_k: experts per token in each head.
        heads: attention heads, each with its own `num_experts` experts.
        expert_dropout: in training, the probability that an expert cannot be chosen by a token.
    """

    heads: int = 2
    expert_dropout: float = 0.0


class SwitchHead(Router):
    """In each head the top-k of sigmoid(W h), with the sigmoids as weights: no competition, no loss, no noise (section
    2.2, number from memory).

    A layer has two such routers: one over keys' tokens, for value projections, and one over queries' tokens, for output
    projections. Expert e of head h is number h * E + e, and a token has k choices of head 0, then k of head 1, and so
    on. Dropout hides an expert from the choice, and leaves its weight as it is.

    Implementations: one is known, the authors' RobertCsordas/switchhead (`SwitchHeadCore.get_sel`), and ours equals it.
    There, rows of the gate begin at unit length times their own deviation over that of all, here at unit length; and
    one expert alone has a sigmoid for outputs and none for values, here both.

    Attributes:
        reach: heads * E.
    """

    Options = SwitchHeadOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: SwitchHeadOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.reach = self.options.heads * num_experts

    @property
    def active(self) -> float:
        """Those of all heads."""
        return float(self.options.heads * self.options.top_k)

    def make_gate(self, hidden_size: int) -> None:
        """A row per expert of each head; all rows are of one length, as experts that compete fairly need."""
        rows_SD = torch.randn(self.options.heads * self.num_experts, hidden_size)
        self.weight = nn.Parameter(nn.functional.normalize(rows_SD))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, of scores [T, heads * E]."""
        heads, dropout = self.options.heads, self.options.expert_dropout
        weight_THE = wide(scores_TE).view(len(scores_TE), heads, self.num_experts).sigmoid()
        ranked_THE = weight_THE.detach()
        if context.training and dropout:
            ranked_THE = ranked_THE.masked_fill(uniform(ranked_THE.shape, ranked_THE, context) < dropout, -torch.inf)
        index_THK = top(ranked_THE, self.options.top_k)
        first_H1 = torch.arange(heads, device=index_THK.device)[:, None] * self.num_experts
        return routing((index_THK + first_H1).flatten(1), weight_THE.gather(-1, index_THK).flatten(1))
