"""Switch Transformers: one expert a token, as a one-hot row that is zero where the expert was full."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, dispatch_tap
from moectl.traces.trace import NO_EXPERT


def tap(model: nn.Module, name: str) -> Tap:
    """The expert's number, from its row [T, 1, E]."""

    def chosen(one_hot_T1E: Tensor, weight_T1: Tensor) -> Choice:
        value_T1, index_T1 = one_hot_T1E.max(-1)
        return index_T1.masked_fill(value_T1 == 0, NO_EXPERT), weight_T1

    return replace(dispatch_tap(model, name), chosen=chosen)
