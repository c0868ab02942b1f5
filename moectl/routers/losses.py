"""Losses that routers share: balance, importance, load, z. Scalars without coefficients, in float32 or wider.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

from torch import Tensor

from moectl.routers.protocol import counts, wide


def load_balancing(probability_TE: Tensor, index_TK: Tensor) -> Tensor:
    """E * sum_e f_e * P_e: f the share of assignments, P the mean probability; 1 at balance.

    Switch Transformer (arXiv 2101.03961, eq. 4-6); over k choices f is over all of them. transformers' own function
    leaves the share of k out, and is k at balance.
    """
    num_experts = probability_TE.shape[-1]
    load_E = counts(index_TK, num_experts).to(probability_TE.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    return num_experts * (share_E * probability_TE.mean(0)).sum()


def squared_cv(value_E: Tensor) -> Tensor:
    """The squared coefficient of variation, of the population (arXiv 1701.06538, eq. 7); 0 of a single value."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)


def z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return wide(logits_TE).logsumexp(-1).square().mean()
