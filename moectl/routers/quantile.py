"""Quantile balancing (NVIDIA/Megatron-LM, `qb_dual_update`): each expert's price is the quantile that fills it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.processes import summed
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class QuantileOptions(Options):
    """The values of Megatron-LM.

    Attributes:
        top_k: experts per token; fewer than there are.
        momentum: share of the old prices that a step keeps (Megatron-LM's `moe_router_quantile_balancing_ema`).
        scale: what a token's weights add up to.
    """

    top_k: int = 2
    momentum: float = 0.0
    scale: float = 1.0


class Quantile(Router):
    """The k best z - beta, weights a softmax of the chosen z; no loss.

    One step of coordinate descent on the dual of balanced assignment: alpha_t is the k+1-th best z - beta of a token,
    and the new beta_e is the (k T / E + 1)-th largest z_e - alpha, so that k T / E tokens want e at that price. The
    steps of one update, those of all processes, are averaged, and beta is moved to mean 0. As in Megatron-LM, what a
    training call found is kept aside until `after_step`; found twice, as under gradient checkpointing, it is the same.

    There is no paper: the rule is Jianlin Su's, told on his blog (kexue.fm/archives/11619, 2026).

    Implementations: NVIDIA/Megatron-LM (`qb_dual_update`) is followed; it rounds k T / E down, and gathers the scores
    of all tensor- and context-parallel ranks first.
    """

    Options = QuantileOptions
    beta: Tensor
    found: Tensor
    calls: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: QuantileOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.top_k == num_experts:
            raise ValueError(f"top_k is all {num_experts} experts: there is nothing to choose")
        self.register_buffer("beta", torch.zeros(num_experts))
        self.register_buffer("found", torch.zeros(num_experts), persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; in training the next prices are put aside."""
        z_TE, k = wide(scores_TE), self.options.top_k
        priced_TE = z_TE.detach() - self.beta.to(z_TE)
        order_TK = top(priced_TE, k + 1)
        if context.training and len(z_TE):
            share = len(z_TE) * k // self.num_experts
            over_TE = z_TE.detach() - priced_TE.gather(1, order_TK[:, k:])
            self.found += over_TE.sort(0, descending=True).values[share].to(self.found)
            self.calls += 1
        index_TK = order_TK[:, :k]
        return routing(index_TK, self.options.scale * z_TE.gather(1, index_TK).softmax(-1))

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Take over the prices of the calls since the last step, on all processes."""
        found, calls = summed(self.found), summed(self.calls)
        if calls:
            momentum = self.options.momentum
            self.beta.mul_(momentum).add_((1 - momentum) * found / calls)
            self.beta -= self.beta.mean()
        self.found.zero_()
        self.calls.zero_()
