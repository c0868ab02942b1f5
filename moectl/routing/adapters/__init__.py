"""Families whose routing is read in a way of their own: one small file each, and one line here.

An adapter is `(model, name) -> Tap | None`, for a module of a class (or a subclass) of the given name; None says that
there is nothing to read. Other packages add theirs as entry points of the group `moectl.routing_adapters`, called like
the class.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from torch import nn

from moectl.routing.adapters import (
    deepseek_v4,
    doge,
    ernie_vl,
    gemma4,
    jetmoe,
    llama4,
    longcat,
    mxfp4,
    nllb,
    switch,
    zaya,
)
from moectl.routing.tap import Tap

Adapter = Callable[[nn.Module, str], Tap | None]

ADAPTERS: dict[str, Adapter] = {
    "DeepseekV4Experts": deepseek_v4.tap,
    "DiffusionGemmaTextExperts": gemma4.tap,
    "DogeCDMoE": doge.tap,
    "Ernie4_5_VLMoeMoeExperts": ernie_vl.tap,
    "Gemma4TextExperts": gemma4.tap,
    "JetMoeTopKGating": jetmoe.tap,
    "Llama4Router": llama4.tap,
    "LongcatFlashExperts": longcat.tap,
    "Mxfp4GptOssExperts": mxfp4.tap,
    "NllbMoeExperts": nllb.tap,
    "SwitchTransformersExperts": switch.tap,
    "ZayaExperts": zaya.tap,
}
"""The name of a module's class -> its adapter."""

ENTRY_POINTS = "moectl.routing_adapters"


def adapters() -> dict[str, Adapter]:
    """Ours and those of other installed packages, which come first."""
    return ADAPTERS | {entry.name: entry.load() for entry in entry_points(group=ENTRY_POINTS)}
