"""Opening the models that a command is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moectl.checkpoint.source import Checkpoint


def opened(model: str, revision: str | None) -> Checkpoint:
    """The checkpoint, with what is odd about it said on stderr.

    Raises:
        InputError: as `Checkpoint.open` raises it.
    """
    from moectl.checkpoint.source import Checkpoint

    checkpoint = Checkpoint.open(model, revision)
    warn_of([checkpoint])
    return checkpoint


def warn_of(checkpoints: Iterable[Checkpoint]) -> None:
    """Say on stderr what is odd about them, each thing once."""
    from moectl.report import output

    for warning in dict.fromkeys(warning for checkpoint in checkpoints for warning in checkpoint.warnings):
        output.warn(warning)
