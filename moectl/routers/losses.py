"""Losses that routers share: balance, importance, load, z. Scalars without coefficients, in float32 or wider.

Legend: T tokens, E experts, K choices, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.routers.processes import summed
from moectl.routers.protocol import NO_EXPERT, counts, top, wide


def balance(probability_TE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e: f the share of assignments, P the mean probability; 1 at balance.

    Switch Transformer (arXiv 2101.03961, eq. 4-6); over k choices f is over all of them, as in GShard (2006.16668);
    transformers' own function leaves the share of k out, and is k at balance. P is over *all* experts: a softmax over
    the chosen ones alone has the constant mean 1/K, and no gradient (the released code of arXiv 2401.02731 does that).

    Args:
        load_E: how many assignments each expert received; it may be counted over more tokens than `probability_TE` has
            (arXiv 2501.11873), and then the mean of this loss over the pieces of a batch is the loss of the batch.
    """
    load_E = load_E.to(probability_TE.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    return len(load_E) * torch.dot(share_E, probability_TE.mean(0))


def load_balancing(probability_TE: Tensor, index_TK: Tensor, everywhere: bool = False) -> Tensor:
    """`balance` with the load of these choices; with `everywhere` with that of all processes' tokens.

    Global-batch balancing (arXiv 2501.11873) lets a process's own tokens, of one domain maybe, be uneven.
    """
    load_E = counts(index_TK, probability_TE.shape[-1])
    return balance(probability_TE, summed(load_E) if everywhere else load_E)


def sequence_load_balancing(probability_TE: Tensor, index_TK: Tensor, sequence_T: Tensor | None) -> Tensor:
    """`load_balancing` of each sequence, averaged over sequences (DeepSeek-V3, arXiv 2412.19437, eq. 17-20)."""
    if sequence_T is None or not len(sequence_T):
        return load_balancing(probability_TE, index_TK)
    num_experts, sequences = probability_TE.shape[-1], int(sequence_T[-1]) + 1
    place_TK = torch.where(index_TK == NO_EXPERT, NO_EXPERT, index_TK + num_experts * sequence_T[:, None])
    load_NE = counts(place_TK, sequences * num_experts).view(sequences, num_experts).to(probability_TE.dtype)
    length_N = sequence_T.bincount(minlength=sequences)[:, None].clamp(min=1)
    mean_NE = probability_TE.new_zeros(sequences, num_experts).index_add(0, sequence_T, probability_TE) / length_N
    share_NE = load_NE / load_NE.sum(1, keepdim=True).clamp(min=1)
    return num_experts * (share_NE * mean_NE).sum(1).mean()


def token_load_balancing(weight_TE: Tensor, index_TK: Tensor) -> Tensor:
    """E * sum_e f_e * P_e, with f the share of *tokens* that go to e, P the mean weight: falls with experts per token.

    For gates that choose how many experts a token has (arXiv 2403.07652, 2412.14711), which `load_balancing` would let
    choose them all.
    """
    num_experts = weight_TE.shape[-1]
    share_E = counts(index_TK, num_experts).to(weight_TE.dtype) / len(index_TK)
    return num_experts * (share_E * weight_TE.mean(0)).sum()


def squared_cv(value_E: Tensor) -> Tensor:
    """The squared coefficient of variation, of the population (arXiv 1701.06538, eq. 7); 0 of a single value."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)


def noisy_load(clean_TE: Tensor, noisy_TE: Tensor, top_k: int, deviation: float) -> Tensor:
    """The squared variation over experts of their load, smoothed by the noise on the scores.

    Load is the mean chance that an expert's score is above the token's k-th noisy one if its noise, and no other's,
    were drawn again (V-MoE, arXiv 2106.05974, appendix A.2).
    """
    threshold_T1 = noisy_TE.gather(1, top(noisy_TE, top_k)[:, -1:])
    return squared_cv(torch.special.ndtr((clean_TE - threshold_T1) / deviation).mean(0))


def importance_and_load(clean_TE: Tensor, noisy_TE: Tensor, top_k: int, deviation: float) -> Tensor:
    """The mean of the squared variations of importance, the summed probabilities before noise, and of `noisy_load`.

    Without noise importance alone, for there is no chance to speak of (google-research/vmoe, `vmoe/nn/routing.py`).
    """
    importance = squared_cv(clean_TE.softmax(-1).sum(0))
    return (importance + noisy_load(clean_TE, noisy_TE, top_k, deviation)) / 2 if deviation else importance


def entropy(probability: Tensor) -> Tensor:
    """Over the last dimension, in nats; 0 log 0 is 0, and has a finite gradient."""
    least = torch.finfo(probability.dtype).tiny
    return -(probability * probability.clamp(min=least).log()).sum(-1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return wide(logits_TE).logsumexp(-1).square().mean()
