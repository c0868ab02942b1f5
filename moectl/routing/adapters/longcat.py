"""LongCat-Flash: the last experts are the identity, and cost nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moectl.routing.tap import Tap, dispatch_tap


def tap(model: nn.Module, name: str) -> Tap:
    """As everywhere, with the number of experts that are the identity."""
    found = dispatch_tap(model, name)
    experts: Any = found.experts
    return replace(found, point=replace(found.point, null_experts=experts.zero_expert_num))
