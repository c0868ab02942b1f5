"""The routers of a transformers model, by the table in which transformers itself says what computes router logits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from torch import nn

from moectl.families.releases import RECORDS, needs


def recorded_routers(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Name, module, and place of the logits in its output, of every router of a model in its order.

    Raises:
        InputError: there are experts, but transformers does not say what their router is.
    """
    classes = _classes(model)
    found = []
    for name, module in model.named_modules():
        output = next((index for kind, at, index in classes if isinstance(module, kind) and at in f".{name}."), None)
        if output is not None:
            found.append((name, module, output))
    if not found and any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise needs(
            RECORDS,
            f"transformers {version('transformers')} does not say where {type(model).__name__} has its routers.",
            "They cannot be watched, balanced or replaced.",
        )
    return found


def _classes(model: nn.Module) -> list[tuple[type, str, int]]:
    """What is recorded as router logits (`_can_record_outputs`): class, part of the name, place in the output."""
    found: list[tuple[type, str, int]] = []
    for module in model.modules():
        table = getattr(module, "_can_record_outputs", None) or {}
        for recorder in _as_list(table.get("router_logits")):
            target = getattr(recorder, "target_class", recorder)
            part = (getattr(recorder, "layer_name", None) or "").strip(".")
            entry = (target, f".{part}." if part else "", int(getattr(recorder, "index", 0)))
            if isinstance(target, type) and entry not in found:
                found.append(entry)
    return found


def _as_list(value: Any) -> Iterator[Any]:
    if value is not None:
        yield from value if isinstance(value, list | tuple) else (value,)
