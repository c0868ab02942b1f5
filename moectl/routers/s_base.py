"""S-BASE (arXiv 2202.01169): a transport plan with even marginals, by Sinkhorn's algorithm, chooses in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class SBaseOptions(Options):
    """Section 3.1.

    Attributes:
        tolerance: when to stop: the mean change of the experts' log factors in a round.
        rounds: at most.
    """

    top_k: int = 1
    tolerance: float = 1e-4
    rounds: int = 100


class SBase(Router):
    """In training the k largest of Pi = diag(u) exp(z) diag(v), whose rows sum to 1/T and columns to 1/E; else of z
    (section 3.1).

    The plan chooses and is no weight: that is sigmoid(z) for one expert, softmax(z) for more, not renormalised. Most
    that a plan wants may still be uneven: nothing is dropped.

    Implementations: the authors' code is not public (from memory). NVIDIA/Megatron-LM (`sinkhorn`,
    `sinkhorn_load_balancing`) is followed: it iterates on exp(z), with 1e-8 added to sums, and stops when v changes by
    less than 1e-4 in the mean; ours iterates on logarithms, which do not overflow, and stops by the change of log v.
    RobertCsordas/moe_layer (`sinkmoid`) makes 3 rounds (`rounds`), and weighs by a sigmoid for any k.
    """

    Options = SBaseOptions

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; there is no loss."""
        scores_TE, options = wide(scores_TE), self.options
        choice_TE = sinkhorn(scores_TE, options.tolerance, options.rounds) if context.training else scores_TE
        index_TK = top(choice_TE, options.top_k)
        share_TE = scores_TE.sigmoid() if options.top_k == 1 else scores_TE.softmax(-1)
        return routing(index_TK, share_TE.gather(1, index_TK))


@torch.no_grad()
def sinkhorn(scores_TE: Tensor, tolerance: float = 1e-4, rounds: int = 100) -> Tensor:
    """The logarithm of the plan: scores with something added to each row and column, so that columns sum to 1/E and,
    up to `tolerance`, rows to 1/T."""
    T, E = max(len(scores_TE), 1), scores_TE.shape[1]
    column_E = scores_TE.new_zeros(E)
    for _ in range(rounds):
        row_T = -math.log(T) - (scores_TE + column_E).logsumexp(1)
        before_E, column_E = column_E, -math.log(E) - (scores_TE + row_T[:, None]).logsumexp(0)
        if (column_E - before_E).abs().mean() < tolerance:
            break
    return scores_TE + row_T[:, None] + column_E
