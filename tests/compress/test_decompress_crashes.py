"""`moectl decompress` whose disk is full, or that is killed where files begin and end.

After each interruption there is no output, or the whole; the same command then makes the bytes of an undisturbed run,
and leaves nothing else behind.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from coded_models import write_coded
from disks import Effects, Failing, Killed, killed
from qmoe_runs import memory, names
from trees import tree

from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.compress.decoding import Decoding
from moectl.compress.decompress import plan_decompress
from moectl.errors import MachineError
from moectl.families.tiny_moe import tiny_moe

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 32, "moe_intermediate_size": 24, "num_experts": 2}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A coded model of one layer, and what becomes of it undisturbed in three shards."""
    with memory() as directory:
        write_coded(tiny_moe("qwen3_moe", **SIZES), directory)
        plan = planned(directory / "coded")
        assert len(plan.shards) > 2
        write(plan, directory / "clean")
        yield directory


def planned(coded: Path) -> Plan:
    return plan_decompress(Decoding.of(Checkpoint.open(coded)), "auto", 8_000)


class Recorded(Effects):
    """Remembers which effects there were."""

    def __init__(self) -> None:
        super().__init__()
        self.verbs: list[str] = []

    def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
        self.verbs.append(verb)
        return effect(*arguments)


def boundaries(place: Path) -> list[int]:
    """The effects with which files or directories come, are given their names, or go."""
    with memory() as directory:
        fs = Recorded()
        write(planned(place / "coded"), directory / "out", fs=fs)
    found = [n for n, verb in enumerate(fs.verbs, start=1) if verb not in ("write", "copy", "sync", "close")]
    assert len(found) > 30 and {"create", "rename", "remove_tree"} <= set(fs.verbs)
    return [n for n in found if fs.verbs[n - 1] != "sync_directory"]


def comes_to_the_same(place: Path, interrupt: Callable[[Path], object]) -> None:
    """After what is done to a first run, there is no output or the whole, and the same command makes the whole."""
    clean = tree(place / "clean")
    with memory() as directory:
        out = directory / "out"
        interrupt(out)
        assert not out.exists() or tree(out) == clean
        write(planned(place / "coded"), out, fs=Effects())
        assert tree(out) == clean and names(directory) == ["out"]


def test_killed_at_any_file_boundary_it_resumes_to_the_same_bytes(place: Path, record_property: Any) -> None:
    moments, plan = boundaries(place), planned(place / "coded")
    for n in moments:

        def kill(out: Path, n: int = n) -> None:
            assert killed(lambda: write(plan, out, fs=Killed(n, torn=n % 2 == 0)))

        comes_to_the_same(place, kill)
    record_property("moments at which decompress was killed", len(moments))


def test_on_a_disk_that_is_full_what_was_done_is_kept(place: Path) -> None:
    plan = planned(place / "coded")
    for n in boundaries(place)[::4]:

        def fill(out: Path, n: int = n) -> None:
            with suppress(MachineError):  # at a place where it does no harm there is no error
                write(plan, out, fs=Failing(n, errno.ENOSPC))

        comes_to_the_same(place, fill)
