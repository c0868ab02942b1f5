"""DEMix layers (arXiv 2108.05036): one expert per domain; at test time a mixture of what the domains' models say.

Legend: T tokens, J domains, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.labels import labelled
from moectl.routers.protocol import Context, Options, Routing, routing, wide
from moectl.routers.single import Single


@dataclass(frozen=True, slots=True)
class DeMixOptions(Options):
    """One expert, always."""

    top_k: int = 1


class DeMix(Single):
    """The expert of the token's domain, with weight 1. Nothing is learnt, nothing is balanced but by the data.

    Experts are domains, so that one can be added or removed. For text of an unknown domain the layers are run once for
    each domain, and the predictions are mixed with `posterior` (section 5; number from memory).

    Implementations: one is known, the release (kernelmachine/demix). Its `SequenceScorer` weighs domains by the
    likelihood of one token, where the paper takes all before: `history=False`; it begins each sequence with equal
    weights if it was given a prior, where this begins with the prior; and it can take the plain mean of all domains.
    """

    Options = DeMixOptions

    def make_gate(self, hidden_size: int) -> None:
        """There is none."""

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Zeros [T, E]: the choice is by domain."""
        return wide(hidden_TD).new_zeros(len(hidden_TD), self.num_experts)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice."""
        index_T1 = labelled(context.task_T, self.num_experts, "domain")[:, None]
        return routing(index_T1, torch.ones_like(index_T1, dtype=wide(scores_TE).dtype))


def posterior(log_likelihood_TJ: Tensor, prior_J: Tensor, history: bool = True) -> Tensor:
    """How probable each domain is at each token, given only tokens before it [T, J]; the first has the prior.

    P(j | x_<t) is in proportion to p(x_<t | j) P(j), by Bayes' rule.

    Args:
        log_likelihood_TJ: log p(x_t | x_<t, j), of the same tokens under each domain's model.
        prior_J: positive, adds up to 1.
        history: whether all tokens before count, or the last alone.
    """
    before_TJ = log_likelihood_TJ.roll(1, 0)
    before_TJ[0] = 0
    if history:
        before_TJ = before_TJ.cumsum(0)
    return (before_TJ + prior_J.log()).softmax(-1)


def cached_prior(posterior_NJ: Tensor, decay: float = 0.3) -> Tensor:
    """The prior that sequences seen before give: an exponential average of the posteriors at their ends [J].

    The newest sequence counts `decay`, and what was there before 1 - `decay` (`ensemble_eval_lm.py` of the release).
    """
    prior_J = posterior_NJ[0]
    for each_J in posterior_NJ[1:]:
        prior_J = (1 - decay) * prior_J + decay * each_J
    return prior_J
