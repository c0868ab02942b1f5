"""Routers by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Iterator

from moectl.errors import UsageError
from moectl.routers.entry import Entry, Kind
from moectl.routers.table import ROUTERS
from moectl.text import shown

__all__ = ["ROUTERS", "Entry", "find", "names"]


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UsageError: there is none.
    """
    entry = next((entry for entry in ROUTERS if entry.name == name), None)
    if entry is None:
        raise UsageError(f"There is no router {shown(name)!r}.", "", f"Give one of {', '.join(names())}.")
    return entry


def names(kind: Kind = "router") -> Iterator[str]:
    """Of all entries of a kind."""
    return (entry.name for entry in ROUTERS if entry.kind == kind)
