"""The routers of PESC adapters, watched as those of a MoE are.

Shapes: T tokens, E experts; L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moectl.training.routers import MoeBlock


def pesc_blocks(model: nn.Module) -> list[MoeBlock]:
    """The layers with adapter experts in their order; none in a model without."""
    from moectl.integrations.pesc import PescLayer

    return [
        MoeBlock(name, layer.pesc_router, 0, nn.ModuleList([layer.pesc_down, layer.pesc_up]), None)
        for name, layer in model.named_modules()
        if isinstance(layer, PescLayer)
    ]


def pesc_top_k(model: Any) -> int:
    """Adapters that each token is sent to."""
    return int(model.peft_config["default"].top_k)


class PescWatch:
    """What `RouterWatch` is to a MoE: the adapter's layers leave their routing with the model, which hands it over.

    Attributes:
        blocks: the layers that are watched.
    """

    def __init__(self, model: Any, blocks: list[MoeBlock]) -> None:
        self.blocks = blocks
        self._model = model

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Router logits `[T, E]` of each layer, with their graph, and the assignments counted `[L, E]`, int64."""
        routings = self._model.base_model.routings
        counts = [torch.bincount(each.index_TK.flatten(), minlength=each.logits_TE.shape[-1]) for each in routings]
        return [each.logits_TE for each in routings], torch.stack(counts)
