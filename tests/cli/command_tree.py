"""Every command of the program, found by walking Typer's tree: the one place in the tests that does so."""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from moectl.cli.main import app


def leaf_commands() -> list[str]:
    """The commands that do something, as typed after `moectl`: "verify", "upcycle sparse"."""
    return list(_leaves(get_command(app)))


def _leaves(command: Any, *path: str) -> Iterator[str]:
    if not hasattr(command, "commands"):
        yield " ".join(path)
        return
    for name, child in command.commands.items():
        yield from _leaves(child, *path, name)
