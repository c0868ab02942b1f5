"""A compression is killed, interrupted, or the disk or memory fails: the same command comes to the same bytes.

Whenever it ends, the source is as it was, and the output is absent or whole.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qmoe_attacks import asked, at_effect, at_file, fail, resumed, signalled
from qmoe_runs import (
    LAYERS,
    SMALL,
    made_moe,
    names,
    program,
    started,
    words,
)
from trees import tree
from typer.testing import CliRunner

from moectl.cli.main import app
from moectl.compress import qmoe_job
from moectl.compress.pipeline import preflight
from moectl.compress.pipeline import run as pipeline
from moectl.errors import MachineError


def test_killed_again_and_again_it_comes_to_the_same_bytes(
    place: Path, room: Path, clean: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    """Each time a few effects later than the last: in layers, between them, in shards, and while it is published."""
    effects = 4
    while (done := program(asked(place, room / "q"), at_effect(effects, signalled(signal.SIGKILL)))).code:
        assert done.code == -signal.SIGKILL, done.stderr
        assert not (room / "q").exists() or tree(room / "q") == clean
        effects += 6
    resumed(place, room, clean)
    assert effects > 40
    record_property("kills of compress qmoe", effects // 6)


def test_killed_before_and_after_every_boundary(place: Path, room: Path, clean: dict[str, str]) -> None:
    files = [f"layer-{layer:05d}.safetensors" for layer in range(LAYERS)]
    for name in (*files, "rest.safetensors", "model-00002-*.safetensors", "q"):
        for before in (True, False):
            done = program(asked(place, room / "q"), at_file(name, signalled(signal.SIGKILL), before=before))
            assert done.code == -signal.SIGKILL, (name, before)
            assert (room / "q").exists() == ((name, before) == ("q", False))
    resumed(place, room, clean)


def test_what_another_command_has_begun_is_refused_before_the_work(
    place: Path, room: Path, clean: dict[str, str]
) -> None:
    """And with an export, whose files the writer reads are made anew, its own command goes on with it."""
    export = ("--export", "w4a16", "--group-size", "32")
    killed = program(asked(place, room / "q", *export), at_file("model-00002-*", signalled(signal.SIGKILL)))
    assert killed.code == -signal.SIGKILL and "q.partial" in names(room)
    refused = program(asked(place, room / "q"), at_file("*", lambda: fail(errno.EIO)))
    assert refused.code == 2 and "q.partial holds the unfinished output of another command" in refused.stderr
    for out in ("q", "other"):
        assert program(asked(place, room / out, *export)).code == 0
    assert tree(room / "q") == tree(room / "other") and names(room) == ["other", "q"]
    assert program(asked(place, room / "q", "--overwrite")).code == 0
    assert tree(room / "q") == clean


def test_killed_at_random_moments(place: Path, room: Path, clean: dict[str, str]) -> None:
    choose = random.Random(0)
    for _ in range(3):
        process = started(asked(place, room / "q"))
        time.sleep(choose.uniform(0.02, 0.5))
        os.kill(process.number, signal.SIGKILL)
        process.wait()
    resumed(place, room, clean)


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [(signal.SIGTERM, 143, "layer-00001.safetensors"), (signal.SIGINT, 130, "model-00002-*.safetensors")],
)
def test_an_interruption_says_how_to_go_on(
    number: int, code: int, where: str, place: Path, room: Path, clean: dict[str, str]
) -> None:
    done = program(asked(place, room / "q"), at_file(where, signalled(number)))
    assert (done.code, done.stdout) == (code, "")
    assert "Interrupted. If an output was begun it is kept, and the same command resumes it." in done.stderr
    assert "q" not in names(room)
    resumed(place, room, clean)


def test_on_a_full_disk_what_was_done_is_kept(place: Path, room: Path, clean: dict[str, str]) -> None:
    effects = 4
    while (done := program(asked(place, room / "q"), at_effect(effects, lambda: fail(errno.ENOSPC)))).code:
        assert (done.code, done.stdout) == (4, ""), done.stderr
        assert os.strerror(errno.ENOSPC) in done.stderr and "run the same command again to go on" in done.stderr
        assert not (room / "q").exists() or tree(room / "q") == clean
        effects += 25
    resumed(place, room, clean)
    assert effects > 100


def test_a_limit_on_files_is_no_bug(place: Path, room: Path, clean: dict[str, str]) -> None:
    before = tree(place / "moe")
    done = program(asked(place, room / "q"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert done.code == 4 and os.strerror(errno.EFBIG) in done.stderr
    assert tree(place / "moe") == before and names(room) == ["q.statistics"]
    resumed(place, room, clean)


def test_without_memory_it_is_the_machine_that_could_not(place: Path, room: Path, clean: dict[str, str]) -> None:
    done = program(asked(place, room / "q"), at_file("layer-00001.safetensors", lambda: torch.empty(1 << 50)))
    assert done.code == 4 and "out of memory" in done.stderr and "Traceback" not in done.stderr
    resumed(place, room, clean)


@pytest.mark.parametrize(
    ("what", "says"), [("free_bytes", "of disk in"), ("available_memory", "of memory, and 0 B are free")]
)
def test_too_little_room_is_said_before_the_work(
    what: str, says: str, place: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, what, lambda *_: 0)
    monkeypatch.setattr(preflight, "resident", lambda _: 0)
    monkeypatch.setattr(qmoe_job, "run", None)  # calling it would be a bug
    done = CliRunner().invoke(app, asked(place, room / "q"))
    assert isinstance(done.exception, MachineError) and says in done.exception.what
    assert names(room) == []


@pytest.mark.parametrize("act", [os.utime, lambda path: os.truncate(path, 1000)], ids=["written", "cut"])
def test_a_source_that_changes_meanwhile_is_noticed(act: Callable[[Path], None], place: Path, room: Path) -> None:
    made_moe(room / "moe")
    given = words(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    done = program(given, at_file("layer-00000.safetensors", lambda: act(room / "moe" / "model.safetensors")))
    assert done.code == 3 and "model.safetensors" in done.stderr and "was not published" in done.stderr
    assert not (room / "q").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "damage"), [("layer-00000.safetensors", flip), ("layer-00001.safetensors", cut), ("layer-00001.json", cut)]
)
def test_a_finished_layer_that_rotted_is_made_again(
    name: str, damage: Callable[[Path], None], place: Path, room: Path, clean: dict[str, str]
) -> None:
    program(asked(place, room / "q"), at_file("layer-00001.safetensors", signalled(signal.SIGKILL)))
    (folder,) = (room / "q.statistics").glob("layers-*")
    damage(folder / name)
    resumed(place, room, clean)


def test_without_its_hash_a_layer_that_rotted_would_be_taken(
    place: Path, room: Path, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(asked(place, room / "q"), at_file("layer-00001.safetensors", signalled(signal.SIGKILL)))
    (folder,) = (room / "q.statistics").glob("layers-*")
    flip(folder / "layer-00001.safetensors")
    monkeypatch.setattr(pipeline, "_is_whole", Path.exists)
    assert program(asked(place, room / "q")).code == 0
    assert tree(room / "q") != clean
