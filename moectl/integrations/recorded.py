"""The routers of a transformers model, by the table in which transformers itself says what computes router logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def recorded_routers(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Name, module, and place of the logits in its output, of every router of a model in its order."""
    classes = _classes(model)
    found = []
    for name, module in model.named_modules():
        output = next((index for target, index in classes if isinstance(module, target)), None)
        if output is not None:
            found.append((name, module, output))
    return found


def _classes(model: nn.Module) -> list[tuple[type, int]]:
    """The classes whose outputs are recorded as router logits (`_can_record_outputs`), and at which place of them."""
    found: list[tuple[type, int]] = []
    for module in model.modules():
        table = getattr(module, "_can_record_outputs", None) or {}
        for recorder in _as_list(table.get("router_logits")):
            target = getattr(recorder, "target_class", recorder)
            entry = (target, int(getattr(recorder, "index", 0)))
            if isinstance(target, type) and entry not in found:
                found.append(entry)
    return found


def _as_list(value: Any) -> Iterator[Any]:
    if value is not None:
        yield from value if isinstance(value, list | tuple) else (value,)
