"""Soft MoE (arXiv 2308.00951) in an encoder: its experts take mixtures of the tokens of a sequence.

Legend: B sequences, L tokens each, T = B * L; D hidden, E experts, S slots of all sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moectl.integrations.routed.held import Form, Held, Seen
from moectl.routers.soft_moe import SoftMoe


class HeldSlots(Held):
    """In the place of a MoE layer, with its experts: tokens -> slots -> experts -> tokens. There is no padding.

    Sequences are apart, and every expert takes as many slots of each.
    """

    router: SoftMoe
    experts: nn.Module
    form: Form

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states [B, L, D] -> [B, L, D]."""
        hidden_TD = hidden_states.flatten(0, -2)
        context = self.passing.context(hidden_TD, training=self.training)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            found = self.router.route(self.router.score(hidden_TD, context), context)
        per_expert = found.dispatch_TS.shape[1] // self.num_experts
        slot_SD = found.dispatch_TS.T.to(hidden_TD.dtype) @ hidden_TD
        expert_S1 = torch.arange(self.num_experts, device=hidden_TD.device).repeat_interleave(per_expert)[:, None]
        if self.form == "mask":
            expert_S1 = nn.functional.one_hot(expert_S1, self.num_experts)
        out_SD = self.experts(slot_SD, expert_S1, slot_SD.new_ones(len(slot_SD), 1))
        if self.training:
            load_E = torch.full((self.num_experts,), per_expert, device=hidden_TD.device)
            self.seen = Seen(load_E, found.aux_loss)
        return (found.combine_TS.to(out_SD.dtype) @ out_SD).view_as(hidden_states)

    def share(self, sequence_length: int) -> float:
        """Of an expert's work on all tokens, what it does."""
        return float(self.router.options.slots / sequence_length)
