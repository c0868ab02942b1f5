"""Rectify-Router (arXiv 2402.12399): what is dropped stays on its GPU, what is padding takes who came next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, places
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, counts, routing, top, wide


@dataclass(frozen=True, slots=True)
class RectifyOptions(Options):
    """Of a top-k router with a capacity.

    Attributes:
        capacity_factor: places per expert over assignments per expert.
        groups: GPUs: each holds an equal run of the experts, and of the tokens.
        intra: whether a dropped assignment goes to the token's best expert on its own GPU, room or no room.
        fill: how many further choices of each token (the k+1st, ..) may take places that are left; 0: none.
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 2
    capacity_factor: float = 1.0
    groups: int = 4
    intra: bool = True
    fill: int = 1
    aux_loss: float = 0.01


class Rectify(Router):
    """softmax, the k largest, first come first served; then both repairs, weighted by the new expert's probability.

    Intra-GPU rectification costs no traffic and no padding: it goes beyond capacity. Fill-in rectification gives each
    place to the highest probability that asks for it (figure 2). Columns: k choices, repaired where they were dropped,
    then those filled in. Unverified: what is done is told by the abstract, by that figure's caption and by others;
    weights, and how the repairs follow each other, are from memory.

    Implementations: none of both repairs is public, as far as we could find. ZhiYuanZeng/gpt-moe, of an author by its
    name, has a precursor of the first (`local_post_moe.py`): tokens that lost all their choices, and no others, go
    through the experts of their own device, which are all alike there, over weight 1.
    """

    Options = RectifyOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: RectifyOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if num_experts % self.options.groups:
            raise ValueError(f"groups is {self.options.groups}, which does not divide {num_experts} experts")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, repaired, and in training the loss of the choice before."""
        options, (T, E) = self.options, scores_TE.shape
        probability_TE = wide(scores_TE).softmax(-1)
        order_TE = top(probability_TE, E)
        index_TK = order_TE[:, : options.top_k]
        loss = options.aux_loss * load_balancing(probability_TE, index_TK) if context.training else None
        room = capacity(T, E, options.top_k, options.capacity_factor)
        kept_TK = places(index_TK, E) < room
        free_E = room - counts(torch.where(kept_TK, index_TK, NO_EXPERT), E)
        taken_TE = torch.zeros_like(probability_TE, dtype=torch.bool).scatter(1, index_TK, kept_TK)
        if options.intra:
            index_TK, kept_TK, taken_TE = self._stay(probability_TE, index_TK, kept_TK, taken_TE)
        columns = [index_TK]
        for rank in range(options.top_k, min(E, options.top_k + options.fill)):
            next_T1 = order_TE[:, rank : rank + 1]
            asking_T1 = torch.where(taken_TE.gather(1, next_T1), NO_EXPERT, next_T1)
            place_T1 = places(asking_T1, E, probability_TE.gather(1, next_T1)[:, 0].detach())
            filled_T1 = (asking_T1 != NO_EXPERT) & (place_T1 < free_E[next_T1])
            columns.append(torch.where(filled_T1, next_T1, NO_EXPERT))
            free_E = free_E - counts(columns[-1], E)
        index_TK = torch.cat(columns, 1)
        kept_TK = torch.nn.functional.pad(kept_TK, (0, index_TK.shape[1] - options.top_k), value=True)
        return routing(index_TK, probability_TE.gather(1, index_TK.clamp(min=0)), kept_TK, loss)

    def _stay(
        self, probability_TE: Tensor, index_TK: Tensor, kept_TK: Tensor, taken_TE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dropped choices, one after the other, at the best expert of the token's GPU that has it not yet."""
        (T, E), groups = probability_TE.shape, self.options.groups
        home_T = torch.arange(T, device=index_TK.device) * groups // T
        home_E = torch.arange(E, device=index_TK.device) // (E // groups)
        local_TE = probability_TE.detach().masked_fill(home_T[:, None] != home_E, -math.inf)
        index_TK, kept_TK, taken_TE = index_TK.clone(), kept_TK.clone(), taken_TE.clone()
        for k in range(index_TK.shape[1]):
            best_T1 = top(local_TE.masked_fill(taken_TE, -math.inf), 1)
            moved_T1 = ~kept_TK[:, k : k + 1] & ~taken_TE.gather(1, best_T1) & (home_E[best_T1] == home_T[:, None])
            index_TK[:, k : k + 1] = torch.where(moved_T1, best_T1, index_TK[:, k : k + 1])
            kept_TK[:, k : k + 1] |= moved_T1
            taken_TE.scatter_(1, best_T1, moved_T1 | taken_TE.gather(1, best_T1))
        return index_TK, kept_TK, taken_TE
