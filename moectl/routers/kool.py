"""Kool, Maddison and Mnih (arXiv 2109.11817): experts drawn so that capacities hold, weighted so that gradients do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.assignment import balanced, losses_of_moving
from moectl.routers.capacity import capacity, kept
from moectl.routers.noise import gumbel_like, uniform
from moectl.routers.protocol import Context, Options, Routing, counts, routing, top, wide
from moectl.routers.single import Single


@dataclass(frozen=True, slots=True)
class KoolOptions(Options):
    """Section 3.

    Attributes:
        estimator: `balanced`: the best assignment of scores with Gumbel noise; `skip`: draws from the softmax, of which
            a full expert leaves out some, all equally likely.
        capacity_factor: places per expert over tokens per expert.
    """

    top_k: int = 1
    estimator: str = "balanced"
    capacity_factor: float = 1.0


class Kool(Single):
    """In training the weight of the drawn expert z is p(z) over the chance of the draw, so that E[weight at e] = p(e)
    (section 3; number from memory).

    A layer's output is then an unbiased estimate of the whole mixture's, sum_e p_e E_e(x), and so is its gradient to
    experts and gate, whatever the capacity did to the draws. The paper weights losses and gradients of log p by the
    same ratios; here what is weighted is the expert's output, as for every router. The chance of the draw:

    - skip: p(z) * min(n, c) / n with n tokens that drew z and c places; so the weight is n / min(n, c), and its
      gradient that of log p.
    - balanced: given the noise of all other tokens, softmax_e(log p_e - loss of value to the others if they give up a
      place at e for one at z), by shortest paths between experts.

    In use: the most probable expert, unweighted.

    Implementations: none is public.

    Unverified: the abstract and introduction say that there are two unbiased estimators, one that skips what exceeds
    an expert's room, and one of balanced assignments by an extended Gumbel-Matching distribution, and that the first
    did better on a toy task; the formulas are from memory. That both are unbiased is tested.
    """

    Options = KoolOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: KoolOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.estimator not in ("balanced", "skip"):
            raise ValueError(f"estimator is {self.options.estimator!r}, neither balanced nor skip")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The draw; there is no loss."""
        log_TE = wide(scores_TE).log_softmax(-1)
        if not context.training:
            index_T1 = top(log_TE, 1)
            return routing(index_T1, torch.ones_like(index_T1, dtype=log_TE.dtype))
        room = capacity(len(log_TE), self.num_experts, 1, self.options.capacity_factor)
        perturbed_TE = log_TE.detach() + gumbel_like(log_TE, context.generator)
        if self.options.estimator == "skip":
            index_T1 = top(perturbed_TE, 1)
            order_T = uniform((len(log_TE),), log_TE, context)
            load_E = counts(index_T1, self.num_experts)
            kept_E = load_E.clamp(max=room) / load_E.clamp(min=1)
            chance_T1 = (log_TE.detach().gather(1, index_T1).exp() * kept_E[index_T1]).detach()
            kept_T1 = kept(index_T1, self.num_experts, room, order_T)
        else:
            index_T1 = balanced(perturbed_TE, room)[:, None]
            loss_EE = losses_of_moving(perturbed_TE, index_T1[:, 0], room).to(log_TE)
            chance_TE = (log_TE.detach() - loss_EE.t()[index_T1[:, 0]]).softmax(-1)
            chance_T1, kept_T1 = chance_TE.gather(1, index_T1), None
        return routing(index_T1, log_TE.gather(1, index_T1).exp() / chance_T1, kept_T1)
