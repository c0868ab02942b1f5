"""The choice that most of today's routers share, with one kernel of `moe_kernels` where the scores are on a GPU.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

import moe_kernels
from moe_kernels import target
from moectl.routers.expert_groups import limited
from moectl.routers.protocol import top, wide


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
    if scores_TE.dtype != torch.float64 and target.uses_triton(scores_TE):
        return moe_kernels.route(
            scores_TE,
            top_k,
            score=score,
            selection_bias_E=None if bias_E is None else bias_E.float(),
            groups=groups,
            top_groups=top_groups,
            group_score=group_score,
            renormalise=normalize,
            scale=scale,
        )
    score_TE = wide(scores_TE).softmax(-1) if score == "softmax" else wide(scores_TE).sigmoid()
    choice_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E.to(score_TE)
    if top_groups < groups:
        choice_TE = limited(choice_TE, groups, top_groups, 2 if group_score == "top2" else 1)
    index_TK = top(choice_TE, top_k)
    weight_TK = score_TE.gather(1, index_TK)
    if normalize:
        weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
    return index_TK, scale * weight_TK if scale != 1 else weight_TK
