"""Values of options that no command could use, refused before anything is read: callbacks of Typer's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moectl.errors import UsageError
from moectl.text import escape, shown


def one_of(option: str, *names: str) -> Callable[[str], str]:
    """Refuses, with UsageError, what is none of the names."""

    def check(value: str) -> str:
        if value not in names:
            given = f"{', '.join(names[:-1])} or {names[-1]}"
            raise UsageError(f"{option} {shown(value)!r} is not known.", "", f"Give {given}.")
        return value

    return check


def place(path: Path | None) -> Path | None:
    """Refuses, with UsageError, what would lie inside of a file."""
    if path is None:
        return None
    around = next((each for each in path.absolute().parents if each.exists()), path)
    if not around.is_dir():
        raise UsageError(
            f"{escape(str(around))} is a file.", f"{escape(str(path))} would be in it.", "Give another place."
        )
    return path


def file(path: Path | None) -> Path | None:
    """Refuses, with UsageError, a directory, and what would lie inside of a file."""
    if path is not None and path.is_dir():
        raise UsageError(f"{escape(str(path))} is a directory.", "One file is written.", "Give the name of a file.")
    return place(path)
