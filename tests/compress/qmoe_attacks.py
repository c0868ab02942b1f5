"""What befalls a compression in tests: moments at which it is killed or fails; and that it comes to the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmoe_runs import (
    SMALL,
    names,
    program,
    words,
)
from trees import tree

from moectl.checkpoint.fs import FileSystem


def asked(place: Path, out: Path, *options: Any) -> list[str]:
    """The command in several shards, for they take the writer several effects."""
    return words(place / "moe", out, *SMALL, "--shard-size", "50kB", *options, data=place / "counting.jsonl")


def resumed(place: Path, room: Path, clean: dict[str, str]) -> None:
    """The same command ends in the bytes of an undisturbed run, and leaves nothing else."""
    assert not (room / "q").exists() or tree(room / "q") == clean
    done = program(asked(place, room / "q"))
    assert (done.code, done.stdout) == (0, f"{room / 'q'}\n"), done.stderr
    assert tree(room / "q") == clean and names(room) == ["q"]


EFFECTS = ("create", "write", "copy", "sync", "rename", "rename_new", "remove", "remove_tree")


def around_effects(around: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]) -> None:
    """Let everything that this process does to files go through `around`: what it is, and what does it."""
    for verb in EFFECTS:
        inner = getattr(FileSystem, verb)

        def effect(self: FileSystem, *given: Any, verb: str = verb, inner: Any = inner) -> Any:
            return around(verb, given, lambda: inner(self, *given))

        setattr(FileSystem, verb, effect)


def at_effect(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Something is done before an effect."""
    left = [number]

    def around(_verb: str, _given: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return effect()

    return lambda: around_effects(around)


def at_file(pattern: str, act: Callable[[], Any], *, before: bool = False) -> Callable[[], None]:
    """Something is done when a file or directory is given its name, before or after."""

    def around(verb: str, given: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        here = verb == "rename" and Path(given[1]).match(pattern)
        if here and before:
            act()
        result = effect()
        if here and not before:
            act()
        return result

    return lambda: around_effects(around)


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))
