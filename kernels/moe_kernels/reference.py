"""Routing, dispatch and expert layers in plain torch, loops included: what every kernel is tested against.

It computes in the type it is given, up to float64.

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k,
S = T*K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels.activations import SWIGLU, Activation


def expert_mlp(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    activation: Activation | Callable[[Tensor], Tensor] = SWIGLU,
    gate_up_bias_EG: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    post_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y_t = sum_k weight_tk * down_e a(gate_up_e x_t) with e = index_tk (arXiv 2401.04088, section 2.1).

    Args:
        x_TD: tokens [T, D].
        gate_up_EGD: up-projections [E, G, D], gate rows first; `interleaved`: gate and up rows alternate.
        down_EDF: down-projections [E, D, F].
        index_TK: chosen experts [T, K], integers; an id >= E is another device's and adds nothing.
        weight_TK: what each choice counts for [T, K].
        activation: an Activation, or any function from [n, G] to [n, F].
        gate_up_bias_EG, down_bias_ED: biases, or None.
        transposed: the matrices are [E, D, G] and [E, F, D].
        post_norm: applied to each expert's output rows before they are weighted.

    Returns:
        [T, D] in the type of `x_TD`, which is also the type of the computation.
    """
    if transposed:
        gate_up_EGD, down_EDF = gate_up_EGD.mT, down_EDF.mT
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(gate_up_EGD)):
        token, choice = (index_TK == expert).nonzero(as_tuple=True)
        h = x_TD[token] @ gate_up_EGD[expert].T
        if gate_up_bias_EG is not None:
            h = h + gate_up_bias_EG[expert]
        out = (activation(h, interleaved) if isinstance(activation, Activation) else activation(h)) @ down_EDF[expert].T
        if down_bias_ED is not None:
            out = out + down_bias_ED[expert]
        if post_norm is not None:
            out = post_norm(out)
        y_TD = y_TD.index_add(0, token, weight_TK[token, choice, None].to(out.dtype) * out)
    return y_TD


def dispatch(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows grouped by expert, in their old order within one: `offsets` [E+1], `row` [S], `inverse` [S].

    Expert e has the places offsets[e]..offsets[e+1]; row[place] = t*K + k; inverse[t*K + k] = place, or -1 where the
    id is not one of 0..E-1. Places from offsets[E] on are not in use, and `row` holds the dropped rows there.
    """
    flat = index_TK.reshape(-1).long()
    kept = (flat >= 0) & (flat < num_experts)
    key = torch.where(kept, flat, num_experts)
    row = key.argsort(stable=True)
    offsets = torch.searchsorted(key[row].contiguous(), torch.arange(num_experts + 1, device=flat.device))
    inverse = torch.empty_like(row)
    inverse[row] = torch.arange(len(row), device=flat.device)
    return offsets, row, torch.where(kept, inverse, -1)


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    selection_bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores, choice and weights of a token-choice router.

    Softmax with or without renormalisation (arXiv 2401.04088, 2409.02060); sigmoid with a selection bias that never
    enters the weight, choosing inside the best groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; its groups are
    ranked by the sum of their two best scores, those of DeepSeek-V2, arXiv 2405.04434, by their best one).

    Args:
        logits_TE: router logits [T, E].
        top_k: experts per token.
        score: "softmax" or "sigmoid".
        selection_bias_E: added to the scores for the choice alone [E].
        groups, top_groups: E/groups neighbouring experts form a group; only the best `top_groups` groups are in the
            choice.
        group_score: "top2" or "max".
        renormalise: divide the chosen scores by their sum.
        scale: factor on the weights.

    Returns:
        index [T, K] int64, best first, the lower id first among equals; weight [T, K] in the type of the logits.
    """
    scores = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    choice = scores if selection_bias_E is None else scores + selection_bias_E
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best = by_group.topk(2).values.sum(-1) if group_score == "top2" else by_group.amax(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[..., :top_groups]
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
        choice = by_group.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    index = choice.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return index, weigh(scores, index, renormalise, scale)


def weigh(scores_TE: Tensor, index_TK: Tensor, renormalise: bool, scale: float) -> Tensor:
    """The weights [T, K] of chosen experts."""
    weight_TK = scores_TE.gather(-1, index_TK)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return scale * weight_TK
