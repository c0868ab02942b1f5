"""The choice that most of today's routers share: one kernel of `moe_kernels` on a GPU, one loop on a CPU.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

from torch import Tensor

import moe_kernels


def choose(
    scores_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """index [T, K] and weight [T, K], as `moe_kernels.reference.route` has them, in float32 or wider.

    Args:
        scores_TE: logits.
        top_k: experts per token.
        score: "softmax" or "sigmoid".
        bias_E: added to the scores for the choice alone.
        groups: of as many neighbouring experts each, of which `top_groups` are in the choice.
        top_groups: how many.
        group_score: groups are ranked by the sum of their two best, "top2", or by their best, "max".
        normalize: divide the weights by their sum.
        scale: multiply them, after that.
    """
    if groups == scores_TE.shape[1]:
        group_score = "max"  # of one expert each: it has no two best
    return moe_kernels.route(
        scores_TE,
        top_k,
        score=score,
        selection_bias_E=bias_E,
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
        renormalise=normalize,
        scale=scale,
    )
