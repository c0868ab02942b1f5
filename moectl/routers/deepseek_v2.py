"""DeepSeek-V2 (arXiv 2405.04434, section 2.2): a token reaches few devices, and devices drop what they cannot take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers import expert_groups
from moectl.routers.choice import choose
from moectl.routers.deepseek_moe import device_balance
from moectl.routers.losses import sequence_load_balancing
from moectl.routers.noise import uniform
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class DeepSeekV2Options(Options):
    """The values of the 236B model.

    Attributes:
        top_k: routed experts per token, beside the shared ones.
        groups: devices, each with as many consecutive experts.
        top_groups: devices that a token may reach (M).
        group_score: devices are ranked by their best expert, `max`, or by the sum of their two best, `top2`.
        scale: of the weights (16 in the released model, 1 in V2-Lite).
        normalize: whether weights add up to `scale`.
        capacity_factor: assignments that a device takes, over their mean, in training; 0: all.
        spared: share of the sequences, drawn at random where they are known, of which nothing is dropped; 0.1 in the
            paper.
        aux_loss: coefficient of the balance over experts (alpha_1).
        device_loss: of the balance over devices (alpha_2).
        communication_loss: of the balance of tokens sent to devices (alpha_3).
    """

    top_k: int = 6
    groups: int = 8
    top_groups: int = 3
    group_score: str = "max"
    scale: float = 16.0
    normalize: bool = False
    capacity_factor: float = 1.0
    spared: float = 0.0
    aux_loss: float = 0.003
    device_loss: float = 0.05
    communication_loss: float = 0.02


class DeepSeekV2(Router):
    """softmax; the M devices with the largest single probability; the K best experts there (eq. 20-22, section 2.2.2).

    Losses of experts, devices and communication (eq. 23-31): f''_d = D / (M T) * tokens sent to d, P''_d the summed
    probability of d. In training a device drops its assignments of the least probability beyond its mean (section
    2.2.4); the paper keeps all of a tenth of the sequences, which `spared` does. In use nothing is dropped.

    Implementations: the official inference code (DeepSeek-V3's, with softmax and no bias) and transformers rank devices
    by their best expert, as here; Megatron-LM by the sum of their K / M best, for this model two: `group_score=top2`.
    transformers' router does not divide the weights; Megatron-LM's softmax may be of the chosen logits alone, which is
    `normalize=yes`. The losses over devices and communication, and dropping by device, are in the paper alone:
    Megatron-LM drops by expert.
    """

    Options = DeepSeekV2Options

    def __init__(self, hidden_size: int | None, num_experts: int, options: DeepSeekV2Options | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        expert_groups.check(num_experts, self.options.groups, self.options.top_groups, self.options.top_k)
        if self.options.group_score not in ("max", "top2"):
            raise ValueError(f"group_score is {self.options.group_score!r}, neither max nor top2")

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; dropping and losses in training."""
        options = self.options
        index_TK, weight_TK = choose(
            scores_TE,
            options.top_k,
            groups=options.groups,
            top_groups=options.top_groups,
            group_score=options.group_score,
            normalize=options.normalize,
            scale=options.scale,
        )
        loss = room_TK = None
        if context.training:
            probability_TE = wide(scores_TE).softmax(-1)
            device_TK = index_TK // (self.num_experts // options.groups)
            loss = options.aux_loss * sequence_load_balancing(probability_TE, index_TK, context.sequence_T)
            loss = loss + options.device_loss * device_balance(probability_TE, index_TK, options.groups)
            loss = loss + options.communication_loss * self._communication(probability_TE, device_TK)
            if options.capacity_factor:
                room = math.ceil(options.capacity_factor * index_TK.numel() / options.groups)
                spared_T1 = self._spared(context, probability_TE)
                first_TK = probability_TE.gather(1, index_TK) + spared_T1  # who is spared is the first to find room
                room_TK = _best_of_each(device_TK, first_TK, options.groups, room) | spared_T1
        return routing(index_TK, weight_TK, room_TK, loss)

    def _spared(self, context: Context, like_TE: Tensor) -> Tensor:
        """Whether nothing of a token is dropped, bool [T, 1]."""
        if context.sequence_T is None or not len(like_TE):
            return torch.zeros(len(like_TE), 1, dtype=torch.bool, device=like_TE.device)
        drawn_N = uniform((int(context.sequence_T[-1]) + 1,), like_TE, context)
        return (drawn_N < self.options.spared)[context.sequence_T][:, None]

    def _communication(self, probability_TE: Tensor, device_TK: Tensor) -> Tensor:
        groups, top_groups = self.options.groups, self.options.top_groups
        sent_TG = torch.zeros(len(device_TK), groups, dtype=torch.bool, device=device_TK.device)
        sent_TG.scatter_(1, device_TK, True)
        frequency_G = groups / top_groups * sent_TG.to(probability_TE.dtype).mean(0)
        return (frequency_G * probability_TE.mean(0).view(groups, -1).sum(1)).sum()


def _best_of_each(device_TK: Tensor, affinity_TK: Tensor, groups: int, room: int) -> Tensor:
    """Which assignments are among the `room` of largest affinity of their device, bool [T, K]."""
    flat_S = device_TK.flatten()
    order_S = affinity_TK.detach().flatten().argsort(descending=True, stable=True)
    kept_S = torch.zeros_like(flat_S, dtype=torch.bool)
    for device in range(groups):
        kept_S[order_S[flat_S[order_S] == device][:room]] = True
    return kept_S.view_as(device_TK)
