"""Our own traces: `moectl.traces.store`."""

from __future__ import annotations

from pathlib import Path

from moectl.routing.ingest.formats import Facts
from moectl.traces.store import Recording, is_trace, load


def recognises(path: Path) -> bool:
    """A directory with `trace.json` in it."""
    return is_trace(path)


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """All that was saved; it needs no facts.

    Raises:
        InputError: as `load`.
    """
    return load(path)
