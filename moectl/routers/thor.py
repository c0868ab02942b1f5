"""THOR (arXiv 2110.04260): experts at random, held together by a loss on what the model says with two draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class ThorOptions(Options):
    """Of the released code.

    Attributes:
        top_k: experts per token, drawn without replacement, over 1/k; all of them: their mean.
        level: in use, whether a draw holds for a `token`, a `sequence` or the whole `batch`; in training always the
            batch.
        consistency: in training, what the disagreement of two passes is multiplied with; 0: one pass, and its loss.
    """

    top_k: int = 1
    level: str = "token"
    consistency: float = 1.0


class Thor(Router):
    """One expert, uniformly at random, for each layer and pass of training; there is no gate (section 3, number from
    memory).

    The model is run twice on each batch, and `consistency` of the two outputs is added to the two losses. In use
    experts are drawn per token or per sequence, or all are run.

    Implementations: one is known, the authors' microsoft/Stochastic-Mixture-of-Experts, whose draws and loss (weighed
    by 1) are these. Every second layer has experts. The loss is summed over tokens that are no padding, and the trainer
    divides by their number: whoever calls `consistency` gives it those alone. In use it draws by token or by sentence;
    to run all is the paper's.
    """

    Options = ThorOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: ThorOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.level not in ("token", "sequence", "batch"):
            raise ValueError(f"level is {self.options.level!r}, none of token, sequence and batch")

    def make_gate(self, hidden_size: int) -> None:
        """Nothing."""

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Zeros [T, E]: all experts are alike."""
        return wide(hidden_TD).new_zeros(len(hidden_TD), self.num_experts)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The draw; of scores only the shape is looked at."""
        options, T = self.options, len(scores_TE)
        level = "batch" if context.training else options.level
        group_T = torch.arange(T, device=scores_TE.device)
        if level == "sequence" and context.sequence_T is not None:
            group_T = context.sequence_T
        elif level != "token":
            group_T = torch.zeros_like(group_T)
        groups = int(group_T[-1]) + 1 if T else 0
        drawn_GE = torch.rand(groups, self.num_experts, generator=context.generator, device=scores_TE.device)
        index_TK = drawn_GE.argsort(-1)[group_T, : options.top_k]
        weight_TK = torch.full(index_TK.shape, 1 / options.top_k, dtype=wide(scores_TE).dtype, device=index_TK.device)
        return routing(index_TK, weight_TK)


def consistency(one_TV: Tensor, two_TV: Tensor) -> Tensor:
    """(KL(p|q) + KL(q|p)) / 2 of the softmax of two logits over the vocabulary, of each token [T]."""
    one_TV, two_TV = wide(one_TV).log_softmax(-1), wide(two_TV).log_softmax(-1)
    return ((one_TV.exp() - two_TV.exp()) * (one_TV - two_TV)).sum(-1) / 2
