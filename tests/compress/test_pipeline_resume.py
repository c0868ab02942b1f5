"""A run that was killed anywhere goes on to the same bytes; so does one of several processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed import needs
from pipeline_models import Rounded, saved, token_ids

from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.source import Checkpoint
from moectl.compress.dense import DensePart
from moectl.compress.pipeline.run import run
from moectl.compress.pipeline.settings import Settings

SETTINGS = Settings(dense=DensePart(8), batch_experts=4, min_tokens=1, micro_batch=2)
FILES = ["layer-00000.safetensors", "layer-00001.safetensors", "layer-00002.safetensors", "rest.safetensors"]


class Turned(Rounded):
    """Stores the same numbers, in arrays that lie otherwise in memory."""

    def store(self, *given: Any, **how: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(array, order="F") for name, array in super().store(*given, **how).items()}


class Killed(BaseException):
    """What the process does not survive."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its first layer is dense; it has shared experts, and biases that only choose."""
    return saved(tmp_path_factory.mktemp("models") / "deepseek", "deepseek_v3")[0]


def made(source: Checkpoint, place: Path, method: Rounded = Rounded(), **changes: Any) -> dict[str, bytes]:
    files = run(source, token_ids(4, 16), method, SETTINGS, place, **changes)
    assert [file.name for file in files] == FILES
    assert all(file.is_file() for file in files)
    extra = {path.name for path in files[0].parent.iterdir()} - set(FILES)
    assert extra == {Path(name).with_suffix(".json").name for name in FILES}, "scratch files are gone"
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def expected(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(source, tmp_path_factory.mktemp("whole"))


def test_how_arrays_lie_in_memory_does_not_matter(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert made(source, tmp_path, Turned()) == expected


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die when it is about to give the next file but `number` its name."""
    rename, left = FileSystem.rename, [number]

    def mortal(self: FileSystem, source: Path, target: Path) -> None:
        if left[0] == 0:
            raise Killed(target.name)
        left[0] -= 1
        rename(self, source, target)

    monkeypatch.setattr(FileSystem, "rename", mortal)


def test_killed_before_any_file_has_its_name(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """One run that dies again and again, each time a file or two further, and one that dies once, for every file."""
    died: list[str] = []
    while True:
        with pytest.MonkeyPatch.context() as patch:
            killed_at(2, patch)
            try:
                found = made(source, tmp_path / "again")
                break
            except Killed as death:
                died.append(str(death))
    assert found == expected
    assert {name.partition("-")[0] for name in died} >= {"given", "piece", "left", "layer"}
    for number in range(0, len(died), 3):
        place = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_at(number, patch)
            made(source, place)
        assert made(source, place) == expected
    record_property("kills of the pipeline", len(died) + len(range(0, len(died), 3)))


def test_nothing_is_done_again_for_layers_that_are_finished(
    source: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Unless what the last of them returned is gone: then it is made again from the first."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(25, patch)
        made(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    finished = len(list(folder.glob("layer-*.safetensors")))
    assert finished in (1, 2)
    assert made(source, tmp_path, say=said.append) == expected
    assert len(said) == 3 - finished
    said.clear()
    (folder / FILES[2]).unlink()
    assert made(source, tmp_path, say=said.append) == expected
    assert len(said) == 3


def test_other_tokens_settings_methods_and_models_have_folders_of_their_own(source: Checkpoint, tmp_path: Path) -> None:
    from dataclasses import replace

    from moectl.compress.pipeline.run import folder_of

    class Other(Rounded):
        def to_json(self) -> dict[str, Any]:
            return {"method": "other"}

    token_BL = token_ids(4, 16)
    other_model, _ = saved(tmp_path / "other", "deepseek_v3", seed=1)
    folders = {
        folder_of(source, token_BL, Rounded(), SETTINGS, tmp_path),
        folder_of(source, token_BL[:, :8], Rounded(), SETTINGS, tmp_path),
        folder_of(source, token_BL, Other(), SETTINGS, tmp_path),
        folder_of(source, token_BL, Rounded(), replace(SETTINGS, dense=None), tmp_path),
        folder_of(source, token_BL, Rounded(), replace(SETTINGS, cap=3.0), tmp_path),
        folder_of(other_model, token_BL, Rounded(), SETTINGS, tmp_path),
    }
    assert len(folders) == 6
    assert folder_of(source, token_BL.copy(), Rounded(), SETTINGS, tmp_path) in folders


@needs("switch_transformers")
def test_an_encoder_and_its_decoder_go_on_where_they_were(tmp_path: Path) -> None:
    """Killed in either, and between them; what the encoder returned is kept for all layers of the decoder."""
    source, _ = saved(tmp_path / "model", "switch_transformers")
    ids = token_ids(4, 16), token_ids(4, 12, 1)

    def both(place: Path) -> list[bytes]:
        return [file.read_bytes() for file in run(source, ids, Rounded(), SETTINGS, place)]

    expected = both(tmp_path / "whole")
    for number in (10, 20, 30):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_at(number, patch)
            both(tmp_path / str(number))
        assert both(tmp_path / str(number)) == expected


def forked(work: Callable[[], Any], **environment: str) -> int:
    """The number of a process that does some work, and exits with 0 if it could."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.environ.update(environment)
        work()
        code = 0
    finally:
        os._exit(code)


def test_sigkill_at_any_moment(source: Checkpoint, expected: dict[str, bytes], tmp_path: Path) -> None:
    for wait in (0.05, 0.15, 0.3, 0.1, 0.2):
        process = forked(lambda: made(source, tmp_path))
        time.sleep(wait)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert made(source, tmp_path) == expected


def test_two_processes_make_what_one_makes(source: Checkpoint, expected: dict[str, bytes], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        forked(lambda: run(source, token_ids(4, 16), Rounded(), SETTINGS, tmp_path), RANK=str(rank), **world)
        for rank in range(2)
    ]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    assert made(source, tmp_path) == expected
