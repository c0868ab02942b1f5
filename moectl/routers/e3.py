"""Partitioned ensembles, E3 (arXiv 2110.03360): members of an ensemble share a network, and no expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.losses import importance_and_load
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class E3Options(Options):
    """Of the released configurations (google-research/vmoe, eee_paper).

    Attributes:
        top_k: experts per token and member.
        members: of the ensemble: M runs of E/M experts.
        capacity_factor: places per expert over tokens per expert; 0: no limit.
        noise: its standard deviation in training, times the experts of a member.
        aux_loss: coefficient of the mean of V-MoE's importance and load losses.
    """

    top_k: int = 1
    members: int = 2
    capacity_factor: float = 1.5
    noise: float = 1.0
    aux_loss: float = 0.01


class E3(Router):
    """Each member: softmax over its E/M experts (of noisy scores in training), the k largest, weighted by probability.

    The paper tiles the batch, copy m for member m (section 4; number from memory); here a token comes once and has
    columns m * k to m * k + k - 1 for member m. Members' outputs are to be kept apart, and their predictions averaged.
    Weights of a member sum to 1 at most. Causal for one expert per member, or without a capacity: second choices queue
    behind all first ones.

    Implementations: one is known, google-research/vmoe `NoisyTopExpertsPerItemEnsembleRouter`, and ours equals it,
    except that it tiles, and counts places and losses in groups of the batch; here the group is everything that is
    routed.
    """

    Options = E3Options

    @property
    def active(self) -> float:
        """Those of all members."""
        return float(self.options.members * self.options.top_k)

    def __init__(self, hidden_size: int | None, num_experts: int, options: E3Options | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        members = self.options.members
        if members < 1 or num_experts % members or self.options.top_k > num_experts // members:
            raise ValueError(f"{members} members of {num_experts} experts cannot choose {self.options.top_k} each")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the mean of the members' losses."""
        options, (T, E) = self.options, scores_TE.shape
        size = E // options.members
        clean_TME = wide(scores_TE).view(T, options.members, size)
        noisy_TME, noise = clean_TME, options.noise / size
        if context.training and noise:
            noisy_TME = clean_TME + noise * torch.empty_like(clean_TME).normal_(generator=context.generator)
        probability_TME = noisy_TME.softmax(-1)
        best_TMK = top(noisy_TME, options.top_k)
        index_TK = (best_TMK + size * torch.arange(options.members, device=scores_TE.device)[:, None]).flatten(1)
        room_TK = None
        if options.capacity_factor:
            room_TK = kept(index_TK, E, capacity(T, size, options.top_k, options.capacity_factor))
        loss = None
        if context.training and options.aux_loss:
            each = [
                importance_and_load(clean_TME[:, m], noisy_TME[:, m], options.top_k, noise)
                for m in range(options.members)
            ]
            loss = options.aux_loss * torch.stack(each).mean()
        return routing(index_TK, probability_TME.gather(2, best_TMK).flatten(1), room_TK, loss)
