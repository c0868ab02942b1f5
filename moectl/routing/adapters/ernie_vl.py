"""Ernie 4.5 VL: experts for text and experts for images, each called with the tokens of its own kind."""

from __future__ import annotations

from torch import nn

from moectl.routing.tap import Tap, dispatch_tap


def tap(model: nn.Module, name: str) -> Tap | None:
    """The text experts; those for images never run on text, which is all that is read here."""
    return None if ".vision_moe." in f".{name}." else dispatch_tap(model, name)
