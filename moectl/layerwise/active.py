"""How many parameters a token passes through, by a config and the names and shapes of a model's tensors.

An average where a router's is one, as of expert choice; Mixture-of-Depths counts a layer for the tokens that take it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moectl.errors import InputError, UsageError
from moectl.families.components import ROUTED, component, experts_and_top_k, within
from moectl.routers.registry import find
from moectl.text import reason

Shapes = Mapping[str, tuple[int, ...]]

_NEURONS = ".experts.up_ND"
"""What PEER's experts end with: as many rows as there are neurons."""

_IMPOSSIBLE = (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, UsageError, ValueError)
"""What a router raises of options that are not its own."""


@dataclass(frozen=True)
class Shares:
    """Who works on a token.

    Attributes:
        experts: of a layer; None where there are none.
        active: how many of them work on a token, on average; None where that is not known.
        everywhere: whether the experts of an encoder all work on every token, those of the decoder being `active`.
        held: Mixture-of-Depths: the beginnings of the names of layers with a router before them.
        depth: the share of tokens that pass through those.
        buffers: ends of the names of what routers keep besides parameters.
    """

    experts: int | None
    active: float | None
    everywhere: bool = False
    held: tuple[str, ...] = ()
    depth: float = 1.0
    buffers: tuple[str, ...] = ()

    def of(self, name: str) -> Fraction | None:
        """Which share of tokens a tensor works on, or of a tensor of all experts on a token; None if not known."""
        through = Fraction(self.depth if name.startswith(self.held) and ".router." not in name else 1)
        if component(name) != "experts" or (self.everywhere and "encoder" in name.split(".")):
            return through
        if not self.experts or not self.active or self.active > self.experts:
            return None
        return through * Fraction(self.active) / self.experts

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor is no state that a router of ours keeps."""
        return not name.endswith(self.buffers)


def shares_of(config: Mapping[str, Any], shapes: Shapes) -> Shares:
    """How a model routes, whether by its family's router or as a research checkpoint by one of ours.

    Raises:
        InputError: a research checkpoint's config does not say it.
    """
    if config.get("model_type") != ROUTED:
        experts, top_k = experts_and_top_k(config)
        idle = next((n for place in within(config) if type(n := place.get("zero_expert_num")) is int and n > 0), 0)
        # LongCat's bias aims at 8 of 512 experts from 12 choices among 768: as many as choices made evenly.
        return Shares(experts, top_k * experts / (experts + idle) if experts and top_k and idle else top_k)
    try:
        return _by_router(config, shapes)
    except _IMPOSSIBLE as error:
        raise InputError(
            f"config.json names a router that cannot be made: {reason(error)}",
            "How many parameters a token passes through follows from its options.",
            "Check that config.json belongs to these weights, or fetch the checkpoint again.",
        ) from error


def _by_router(config: Mapping[str, Any], shapes: Shapes) -> Shares:
    import torch

    experts, top_k = experts_and_top_k(config)
    entry = find(config["router"]["name"])
    if entry.name == "peer":
        experts = next((shape[0] for name, shape in shapes.items() if name.endswith(_NEURONS)), experts)
    options = entry.load().Options(**config["router"]["options"])
    with torch.device("meta"):  # what a config asks for may be of any size
        made = entry.load()(None, 1 if entry.name == "mod" else experts, options)
    buffers = tuple(f".router.{name}" for name, _ in made.named_buffers())
    if entry.name == "mod":
        held = {f"{name.partition('.router.')[0]}." for name in shapes if re.search(r"\.layers\.\d+\.router\.", name)}
        return Shares(experts, top_k, held=tuple(held), depth=made.active, buffers=buffers)
    if entry.kind == "slots":
        return Shares(experts, top_k, everywhere=True, buffers=buffers)
    return Shares(experts, None if made.active is None else min(made.active, experts), buffers=buffers)


def active_of(shares: Shares, sizes: Mapping[str, int]) -> Fraction | None:
    """The parameters a token passes through, of tensors of these sizes by their names; None if that is not known."""
    together: dict[Fraction | None, int] = defaultdict(int)
    for name, size in sizes.items():
        if size:
            together[shares.of(name)] += size
    if None in together:
        return None
    return sum((share * size for share, size in together.items() if share is not None), Fraction(0))
