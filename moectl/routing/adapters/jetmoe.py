"""JetMoE: a mixture in attention as in the feed-forward part, both grouped by expert before any module is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, new_point


def tap(model: nn.Module, name: str) -> Tap:
    """The choice, put back from the order of the experts into that of the tokens: exactly what is executed."""
    router: Any = model.get_submodule(name)
    role = "attention" if "self_attention" in name.split(".") else "decoder"
    point = new_point(name, router.num_experts, role=role, score_kind="logits")

    def chosen(output: tuple[Tensor, Tensor, Tensor, list[int], Tensor]) -> Choice:
        slot_S, _token_S, weight_S, size_E, logits_TE = output
        size = torch.tensor(size_E, device=slot_S.device)
        expert_S = torch.arange(len(size_E), device=slot_S.device).repeat_interleave(size, output_size=len(slot_S))
        index_S = torch.empty_like(slot_S).scatter_(0, slot_S, expert_S)
        weight_S = torch.empty_like(weight_S).scatter_(0, slot_S, weight_S)
        return index_S.view(len(logits_TE), -1), weight_S.view(len(logits_TE), -1)

    return Tap(point, None, router, chosen, lambda output: output[4], ordered=True)
