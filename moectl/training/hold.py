"""A training holds two things while it runs: its partial output, alone, and the signals that ask it to stop."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from moectl.checkpoint.fs import FileSystem
from moectl.errors import UsageError
from moectl.text import escape
from moectl.training.recipe import TrainRecipe
from moectl.training.world import World


@dataclass
class Stop:
    """The signal that asked to stop, if any."""

    number: int | None = None
    previous: dict[int, Any] = field(default_factory=dict)


@contextmanager
def claimed(root: Path, fingerprint: str, recipe: TrainRecipe, world: World) -> Iterator[None]:
    """Hold the partial output: make it, or see that it is this training's and nobody is at it.

    If the block fails before there is a checkpoint, nothing is kept.

    Raises:
        UsageError: it is another's, or another process trains into it.
    """
    lock = None
    with world.agreed():
        if world.is_main:
            lock = _claim(root, fingerprint, recipe)
    try:
        yield
    except BaseException:
        if lock is not None and not _is_begun(root):
            FileSystem().remove_tree(root)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def discard(root: Path, fingerprint: str) -> None:
    """Remove the partial output of a training that is complete, if its end was too sudden to do so."""
    about = root / "run.json"
    if about.exists() and json.loads(about.read_text())["fingerprint"] == fingerprint:
        FileSystem().remove_tree(root)


def is_own(root: Path, fingerprint: str) -> bool:
    """Whether the partial output is this training's; if not, it can be made so, for there is nothing in it.

    Raises:
        UsageError: it is another's.
    """
    about = root / "run.json"
    if root.exists() and not about.exists() and any(path.name != "lock" for path in root.iterdir()):
        raise _other(root)
    same = about.exists() and json.loads(about.read_text())["fingerprint"] == fingerprint
    if not same and _is_begun(root):
        raise _other(root)
    return same


def _claim(root: Path, fingerprint: str, recipe: TrainRecipe) -> int:
    is_own(root, fingerprint)
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UsageError(
            f"Another process is training into {escape(str(root))}.",
            "Two of them would overwrite each other's checkpoints.",
            "Wait for it, or give another -o.",
        ) from None
    try:
        same = is_own(root, fingerprint)
    except UsageError:
        os.close(lock)
        raise
    if not same:
        about = root / "run.json"
        work = about.with_suffix(".writing")
        work.write_text(json.dumps({"fingerprint": fingerprint, "recipe": recipe.to_json()}, indent=2) + "\n")
        FileSystem().rename(work, about)
    return lock


def _is_begun(root: Path) -> bool:
    """Whether there is a checkpoint: what has none may be begun anew by anybody."""
    return (root / "checkpoints" / "latest").exists()


def _other(root: Path) -> UsageError:
    return UsageError(
        f"{escape(str(root))} holds an unfinished output of another command.",
        "It was begun with another model, other data or other settings, and cannot be continued with these.",
        "Run that command again, remove the directory, or give another -o.",
    )


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note the first SIGTERM or SIGINT, to stop between two steps; a second one acts as it would without us."""
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        stop.number = number
        signal.signal(number, stop.previous[number])

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        stop.previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in stop.previous.items():
            signal.signal(number, handler)
