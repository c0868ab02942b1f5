"""What is told of routers: a row for each, and the options of one, from its own docstrings."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from moectl.routers.registry import ROUTERS, find
from moectl.routers.spelling import SHORT

Row = dict[str, str]


def listing() -> list[Row]:
    """A row per router, as text."""
    return [
        {
            "router": each.name,
            "title": each.title,
            "papers": ", ".join(each.papers),
            "kind": each.kind,
            "needs": ", ".join(each.needs),
            "causal": "yes" if each.causal else "no",
            "trainable": "yes" if each.trainable else "no",
            "equals": each.same_as,
            "status": "verified" if each.verified else "unverified",
            "source": each.source,
        }
        for each in ROUTERS
    ]


def described(name: str) -> dict[str, Any]:
    """A router's row, its docstring as `about`, and its options with defaults and meanings.

    Raises:
        UsageError: there is no such router.
    """
    entry = find(name)
    kind = entry.load()
    row: dict[str, Any] = next(row for row in listing() if row["router"] == entry.name)
    return {**row, "about": inspect.cleandoc(kind.__doc__ or ""), "options": _options(getattr(kind, "Options", None))}


def _options(kind: Any) -> list[dict[str, Any]]:
    if kind is None:
        return []
    own, told = kind(), _told(kind)
    short = {full: key for key, full in SHORT.items()}
    return [
        {
            "option": f"{field.name} ({short[field.name]})" if field.name in short else field.name,
            "default": getattr(own, field.name),
            "meaning": told.get(field.name, ""),
        }
        for field in fields(kind)
    ]


def _told(kind: Any) -> Row:
    """What the docstrings of a dataclass and those it is made from say of its fields, after `Attributes:`."""
    known = {field.name for field in fields(kind)}
    found: Row = {}
    for each in reversed(kind.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(each.__doc__ or "").partition("Attributes:")[2].splitlines():
            before, _, text = line.strip().partition(": ")
            if known.issuperset(parts := before.split(", ")):
                names = parts
                found |= dict.fromkeys(names, text)
            elif line.strip():
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found
