"""The controller of Scaling Transformers (arXiv 2111.12763): of each block of units one works.

Legend: T tokens, D hidden, E units, K blocks, N units of a block, R rank of the controller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.noise import gumbel_like
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class SparseIsEnoughOptions(Options):
    """Defaults of the released code.

    Attributes:
        top_k: of no effect: as many experts as there are blocks.
        block: experts in a block, of which one works.
        rank: of the controller's matrix.
        temperature: what noise is multiplied with in training.
        hard: share of training batches with one expert per block; the others have all of them, over the softmax.
        scale: whether experts that work alone in their block are weighed by their softmax; else by 1.
    """

    top_k: int = 1
    block: int = 32
    rank: int = 64
    temperature: float = 0.1
    hard: float = 0.3
    scale: bool = False


class SparseIsEnough(Router):
    """z = (h C1) C2 + b in blocks of N; in each the unit of the largest z works (section 3.1, number from memory).

    The experts are the hidden units of a feed-forward layer (any experts will do, in blocks). Training looks at all of
    them: softmax in each block, and in a share of the batches its straight-through version, 1 at the argmax of log
    softmax + temperature * Gumbel noise and 0 elsewhere, with the gradient of the softmax. So index and weight have all
    experts in training, in their order, and one per block in use.

    Implementations: one is known, the authors' google/trax (`research/sparsity.py`), and choice and weights are its. It
    multiplies by the weight inside the ReLU, so that where that is 0 no gradient comes back to it; here whoever runs
    the experts does as they like. Its documentation speaks of a share of blocks that are hard; its code, and ours,
    draws once for the whole batch.

    Raises:
        ValueError: blocks do not divide the experts.
    """

    Options = SparseIsEnoughOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: SparseIsEnoughOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if num_experts % self.options.block:
            raise ValueError(f"{num_experts} experts are not in blocks of {self.options.block}")

    @property
    def active(self) -> float:
        """One of each block, in use."""
        return float(self.num_experts // self.options.block)

    def make_gate(self, hidden_size: int) -> None:
        """Glorot's init of both factors."""
        rank = self.options.rank
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, hidden_size)))
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.num_experts, rank)))
        self.bias = nn.Parameter(torch.empty(self.num_experts).normal_(std=1e-6))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E]."""
        low_TR = nn.functional.linear(wide(hidden_TD), wide(self.down))
        return nn.functional.linear(low_TR, wide(self.weight), wide(self.bias))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """One per block, or in training all."""
        options, T = self.options, len(scores_TE)
        logits_TKN = wide(scores_TE).unflatten(1, (-1, options.block))
        soft_TKN = logits_TKN.softmax(-1)
        if context.training:
            weight_TKN = soft_TKN
            if torch.rand((), generator=context.generator, device=scores_TE.device) < options.hard:
                noise_TKN = options.temperature * gumbel_like(logits_TKN, context.generator)
                chosen_TK = (logits_TKN.log_softmax(-1) + noise_TKN).argmax(-1)
                hard_TKN = nn.functional.one_hot(chosen_TK, options.block)
                weight_TKN = hard_TKN + soft_TKN - soft_TKN.detach()
                weight_TKN = weight_TKN * soft_TKN.detach() if options.scale else weight_TKN
            index_TE = torch.arange(self.num_experts, device=scores_TE.device).expand(T, -1)
            return routing(index_TE, weight_TKN.flatten(1))
        unit_TK = logits_TKN.argmax(-1)
        weight_TK = soft_TKN.gather(2, unit_TK[..., None])[..., 0]
        first_K = torch.arange(0, self.num_experts, options.block, device=scores_TE.device)
        return routing(first_K + unit_TK, weight_TK if options.scale else torch.ones_like(weight_TK))
