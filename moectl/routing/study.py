"""What the user names, a model to run or a recorded trace, with its recordings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moectl.checkpoint.source import Checkpoint
from moectl.traces.store import Recording, is_trace


@dataclass(frozen=True)
class Study:
    """One thing that is looked at: its recordings by stream, and the checkpoint if it is a model."""

    name: str
    recordings: Mapping[str, Recording]
    checkpoint: Checkpoint | None = None


def is_model(source: str) -> bool:
    """Whether something is a checkpoint and no trace: a directory with a config.json, or nothing on this disk."""
    path = Path(source).expanduser()
    return not path.exists() or (path.is_dir() and not is_trace(path) and (path / "config.json").is_file())
