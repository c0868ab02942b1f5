"""SAM, switch and mixture (arXiv 2110.07431): one device by a switch, several experts inside it by a mixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.expert_groups import check, limited
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class SamOptions(Options):
    """As Hetu has them.

    Attributes:
        groups: devices, each with an equal run of the experts.
        capacity_factor: places per expert over assignments per expert; 0: no limit.
        aux_loss: coefficient of the balancing losses, one for each choice.
        alignment: of the alignment loss.
    """

    top_k: int = 2
    groups: int = 4
    capacity_factor: float = 1.0
    aux_loss: float = 0.01
    alignment: float = 0.01


class Sam(Router):
    """p = softmax(z); the group with the largest sum of p; in it the k largest, weighted by p (section 3, number from
    memory).

    The alignment loss, mean over tokens of sum over experts elsewhere of max(0, p_e - p_k), with no gradient to the
    last chosen p_k, draws the k most probable experts into one group. Not causal: second choices queue behind all first
    ones. The paper's own coefficients were not at hand.

    Implementations: one is known, Hsword/Hetu (`SAMGate`, `SamGroupSum`, `SamMax`). It sums the alignment loss over
    tokens; finds a group's experts as if each group had as many experts as there are groups; gives an expert k *
    ceil(cf * T / E) places, here ceil(cf * k * T / E); and has second choices queue behind the number of *last*
    choices, here behind that of first ones.
    """

    Options = SamOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: SamOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        check(num_experts, self.options.groups, 1, self.options.top_k)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training both losses."""
        options, (T, E) = self.options, scores_TE.shape
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(limited(probability_TE, options.groups, 1, E // options.groups), options.top_k)
        weight_TK = probability_TE.gather(1, index_TK)
        room_TK = None
        if options.capacity_factor:
            room_TK = kept(index_TK, E, capacity(T, E, options.top_k, options.capacity_factor))
        loss = None
        if context.training:
            loss = options.aux_loss * options.top_k * load_balancing(probability_TE, index_TK)
            loss = loss + options.alignment * alignment_loss(probability_TE, index_TK, options.groups)
        return routing(index_TK, weight_TK, room_TK, loss)


def alignment_loss(probability_TE: Tensor, index_TK: Tensor, groups: int) -> Tensor:
    """How far experts of other groups are above the last chosen one, per token."""
    size = probability_TE.shape[1] // groups
    elsewhere_TE = torch.arange(probability_TE.shape[1], device=index_TK.device) // size != index_TK[:, :1] // size
    last_T1 = probability_TE.gather(1, index_TK[:, -1:]).detach()
    return ((probability_TE - last_T1).clamp(min=0) * elsewhere_TE).sum(1).mean()
