"""Zaya: a last expert skips the layer; the experts are given number 0 with a weight of zero in its place."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, dispatch_tap, first_scores


def tap(model: nn.Module, name: str) -> Tap:
    """As everywhere, with the skipping expert under its own number, the last."""
    found = dispatch_tap(model, name)
    skip = found.point.num_experts

    def chosen(index_TK: Tensor, weight_TK: Tensor) -> Choice:
        return index_TK.masked_fill(weight_TK == 0, skip), weight_TK

    point = replace(found.point, num_experts=skip + 1, null_experts=1)
    return replace(found, point=point, chosen=chosen, scores=first_scores(skip + 1))
