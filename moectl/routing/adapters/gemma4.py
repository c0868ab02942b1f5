"""Gemma 4 and DiffusionGemma: the router returns probabilities, and each expert has a scale of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moectl.routing.tap import Tap, dispatch_tap


def tap(model: nn.Module, name: str) -> Tap:
    """As everywhere, but scores are probabilities."""
    found = dispatch_tap(model, name)
    return replace(found, point=replace(found.point, score_kind="probabilities"))
