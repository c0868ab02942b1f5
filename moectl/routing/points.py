"""Finding the dispatch points of a model: every place where tokens are sent to experts."""

from __future__ import annotations

from torch import nn

from moectl.errors import InputError
from moectl.integrations.routed.install import held
from moectl.integrations.routed.slots import HeldSlots
from moectl.layerwise.experts import takes_choice
from moectl.routing.adapters import adapters
from moectl.routing.tap import Tap, dispatch_tap


def find(model: nn.Module) -> list[Tap]:
    """The taps of a model in the order of its modules; at least one.

    Raises:
        InputError: the model has no experts, or none that can be seen.
    """
    known = adapters()
    soft = tuple(f"{name}." for name, module in held(model).items() if isinstance(module, HeldSlots))
    taps = []
    for name, module in model.named_modules():
        if soft and name.startswith(soft):  # its experts are given mixtures of tokens, and choose none
            continue
        adapter = next((known[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in known), None)
        if adapter is not None:
            taps.append(adapter(model, name))
        elif takes_choice(module):
            taps.append(dispatch_tap(model, name))
    found = [tap for tap in taps if tap is not None]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no layer whose routing can be seen.",
            "It is dense, or its experts are neither called with (hidden states, index, weights) nor known otherwise.",
            "Give a Mixture-of-Experts model, or an adapter (an entry point of the group `moectl.routing_adapters`).",
        )
    return found
