"""M6-T's expert prototyping (arXiv 2105.15082): k groups of experts, the best of each group, in place of the k best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class PrototypingOptions(Options):
    """Section 3.3.

    Attributes:
        top_k: groups, and so experts per token.
        capacity_factor: places per expert over tokens per expert; 0: no limit.
        aux_loss: coefficient of the balancing losses, one for each group; the paper trains better without.
    """

    top_k: int = 2
    capacity_factor: float = 1.25
    aux_loss: float = 0.0


class Prototyping(Router):
    """In each group of E/k experts a softmax and its largest: y = sum_g p_g,e E_g,e(x) with e = argmax p_g (section 3,
    number from memory).

    Column g is group g's choice: columns are not sorted by weight.

    Implementations: the authors' code was not found. Hsword/Hetu's `KTop1Gate` is followed: a softmax, a queue and a
    balancing loss of its own for each group, weights as they are. It gives an expert k * ceil(cf * T / E) places, here
    ceil(cf * k * T / E), and its gate has a bias.
    """

    Options = PrototypingOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: PrototypingOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if num_experts % self.options.top_k:
            raise ValueError(f"top_k is {self.options.top_k}, which does not divide {num_experts} experts")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the sum of the groups' losses."""
        options, T, E = self.options, *scores_TE.shape
        size = E // options.top_k
        probability_TGE = wide(scores_TE).view(T, options.top_k, size).softmax(-1)
        best_TG1 = top(probability_TGE, 1)
        weight_TK = probability_TGE.gather(2, best_TG1)[..., 0]
        index_TK = best_TG1[..., 0] + size * torch.arange(options.top_k, device=scores_TE.device)
        room_TK = None
        if options.capacity_factor:
            room_TK = kept(index_TK, E, capacity(T, E, options.top_k, options.capacity_factor))
        loss = None
        if context.training and options.aux_loss:
            groups = range(options.top_k)
            loss = options.aux_loss * sum(load_balancing(probability_TGE[:, g], best_TG1[:, g]) for g in groups)
        return routing(index_TK, weight_TK, room_TK, loss)
