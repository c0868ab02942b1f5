"""What is told of routers: a row for each, and the options of one, from its own docstrings."""

from __future__ import annotations

import inspect
from typing import Any

from moectl.routers.registry import ROUTERS, find
from moectl.routers.spelling import SHORT
from moectl.spelling import explained

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
    options = explained(kind.Options, SHORT) if hasattr(kind, "Options") else []
    row: dict[str, Any] = next(row for row in listing() if row["router"] == entry.name)
    return {**row, "about": inspect.cleandoc(kind.__doc__ or ""), "options": options}
