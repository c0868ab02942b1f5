"""Several processes compress the same model: by mistake, or under torchrun."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from qmoe_attacks import asked, at_file, resumed, signalled
from qmoe_runs import (
    Ended,
    names,
    program,
    started,
)
from trees import tree


def test_a_second_process_is_refused_whatever_its_options(place: Path, room: Path, clean: dict[str, str]) -> None:
    reached, reach = os.pipe()
    go, let = os.pipe()

    def pause() -> None:
        os.write(reach, b".")
        os.read(go, 1)

    first = started(asked(place, room / "q"), at_file("layer-00001.safetensors", pause))
    os.read(reached, 1)
    for options in ((), ("--bits", "4"), ("--overwrite",)):
        second = program(asked(place, room / "q", *options))
        assert second.code == 2 and "Another process is at work in" in second.stderr
    os.write(let, b".")
    assert first.wait().code == 0
    assert tree(room / "q") == clean and names(room) == ["q"]
    for descriptor in (reached, reach, go, let):
        os.close(descriptor)


def test_processes_that_begin_at_once_do_no_harm(place: Path, room: Path, clean: dict[str, str]) -> None:
    codes = [process.wait().code for process in [started(asked(place, room / "q")) for _ in range(4)]]
    assert set(codes) <= {0, 2} and 0 in codes
    assert tree(room / "q") == clean and names(room) == ["q"]


def torchrun(arguments: list[str], changes: list[Callable[[], None]]) -> list[Ended]:
    """What torchrun does: a process for each of the changes, with its number in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(changes))}
    ranks = [started(arguments, change, RANK=str(rank), **world) for rank, change in enumerate(changes)]
    return [rank.wait() for rank in ranks]


def test_under_torchrun_one_process_speaks(place: Path, room: Path, clean: dict[str, str]) -> None:
    for _ in range(2):
        first, second = torchrun(asked(place, room / "q"), [lambda: None] * 2)
        assert (first.code, first.stdout) == (0, f"{room / 'q'}\n"), first.stderr
        assert second == Ended(0, "", "")
        assert tree(room / "q") == clean and names(room) == ["q"]


def test_when_one_process_of_several_dies_the_others_say_so(place: Path, room: Path, clean: dict[str, str]) -> None:
    dies = at_file("00001/*.safetensors", signalled(signal.SIGKILL))
    first, second = torchrun(asked(place, room / "q"), [lambda: None, dies])
    assert second.code == -signal.SIGKILL
    assert first.code == 4 and "Another process of this run has ended." in first.stderr
    assert "Traceback" not in first.stderr and names(room) == ["q.statistics"]
    resumed(place, room, clean)
