"""Which modules are experts: those that are called with (hidden states, index, weights)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

_INDEX = re.compile(r"(index|indices|selected_experts|router_mask)$")
_WEIGHTS = re.compile(r"(weights|probs|scores)$")


def takes_choice(module: nn.Module) -> bool:
    """Whether a module is called with (hidden states, index, weights)."""
    return argument_names(type(module)) is not None


def argument_names(kind: type[nn.Module]) -> tuple[str, str] | None:
    """What a class of experts calls its index and its weights; None if it is no such class."""
    return _argument_names(kind.forward)


def choice(module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states [T, D], index [T, K] and weights [T, K] in the arguments of a call of experts."""
    bound = inspect.signature(type(module).forward).bind(module, *given, **named)
    x, index, weight = list(bound.arguments.values())[1:4]
    return x.flatten(0, -2), index.flatten(0, -2), weight.flatten(0, -2)


@cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, str] | None:
    names = list(inspect.signature(forward).parameters)[1:4]
    if len(names) == 3 and _INDEX.search(names[1]) and _WEIGHTS.search(names[2]):
        return names[1], names[2]
    return None
