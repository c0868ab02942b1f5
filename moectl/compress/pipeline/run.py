"""From a checkpoint to layer files: all that is coded of every decoder layer, and of what lies outside them.

A layer file that is there, with its hash beside it, is finished. What the layers returned is kept until the
next one is finished, so a run that was interrupted goes on where it was; run again with the same model, tokens and
settings it gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import save
from torch import Tensor, nn

from moectl.checkpoint.kept import identity, in_order
from moectl.checkpoint.source import Checkpoint
from moectl.compress.calibration import tokens_identity
from moectl.compress.pipeline.finite import require_finite
from moectl.compress.pipeline.layer import LayerWork, left_file
from moectl.compress.pipeline.quantise import quantise
from moectl.compress.pipeline.ranks import Ranks, ranks
from moectl.compress.pipeline.report import LayerReport, note_file, to_metadata
from moectl.compress.pipeline.settings import Settings
from moectl.compress.pipeline.stacks import candidates
from moectl.compress.quantise.piece import to_numpy
from moectl.errors import InputError
from moectl.layerwise.malloc import keep_little
from moectl.layerwise.pairs import Ids, parts
from moectl.layerwise.replay import Replay, Tokens
from moectl.layerwise.stored import write_whole
from moectl.layerwise.whole import check_ids
from moectl.text import escape

if TYPE_CHECKING:
    from moectl.compress.quantise.method import Method

Say = Callable[[str], None]
Advance = Callable[[float], None]
"""Told from time to time which part of the whole is done."""
_REST = "rest.safetensors"


def run(
    checkpoint: Checkpoint,
    tokens_BL: Ids,
    method: Method,
    settings: Settings,
    place: Path,
    say: Say = lambda text: None,
    advance: Advance = lambda done: None,
) -> list[Path]:
    """The layer files, in order, and that of what lies outside the layers.

    Args:
        tokens_BL: token ids to calibrate on; for an encoder-decoder those of sources and those of their targets.
        place: where a folder for this run is made, or found and gone on with.
        say: told what takes time.
        advance: told which part of the whole is done, from 0 to 1.

    Raises:
        InputError: the model cannot be run layer by layer, or its weights or activations are not finite.
    """
    keep_little()
    with ranks() as here:
        settings = replace(settings, device=here.device(settings.device))
        replay = Replay.open(checkpoint, settings.dtype, settings.device)
        _check(replay, tokens_BL)
        folder = folder_of(checkpoint, tokens_BL, method, settings, place)
        folder.mkdir(parents=True, exist_ok=True)
        job = _Job(replay, folder, method, settings, here, _micro_batches(tokens_BL, settings))
        first = job.first_to_do()
        here.wait()
        if here.rank == 0:
            for torn in folder.glob(".*"):
                torn.unlink()
        count = len(replay.layers)
        for index in range(first, count):
            say(f"Layer {index + 1} of {count}")
            _layer(job, index, advance)
        _rest(job)
        advance(1.0)
    return [*job.files, job.rest]


@dataclass(frozen=True)
class _Job:
    replay: Replay
    folder: Path
    method: Method
    settings: Settings
    ranks: Ranks
    batches: list[Tokens]

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"layer-{index:05d}.safetensors" for index in range(len(self.replay.layers))]

    @property
    def rest(self) -> Path:
        return self.folder / _REST

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def first_to_do(self) -> int:
        """The first layer that has no file as it was written, or that comes after one whose results are gone."""
        done = next((index for index, file in enumerate(self.files) if not _is_whole(file)), len(self.files))
        if done == len(self.files):
            return done
        while done and not self._can_start(done):
            done -= 1
        return done

    def _can_start(self, index: int) -> bool:
        """Whether what the layers before returned is there, as far as a layer needs it."""
        folders = {self._scratch(index - 1), self.encoded if index >= self.replay.encoders else None} - {None}
        return all(left_file(each, n).exists() for each in folders if each for n in range(len(self.batches)))

    def work(self, index: int, advance: Advance) -> LayerWork:
        return LayerWork(
            replay=self.replay,
            index=index,
            batches=self.batches,
            before=None if index in (0, self.replay.encoders) else self._scratch(index - 1),
            encoded=self.encoded if self.encoded is not None and index >= self.replay.encoders else None,
            folder=self._scratch(index),
            method=self.method,
            settings=self.settings,
            ranks=self.ranks,
            advance=advance,
        )

    @property
    def encoded(self) -> Path | None:
        """The folder of the encoder's last layer, if there is one."""
        return self._scratch(self.replay.encoders - 1) if self.replay.encoders else None

    def _scratch(self, index: int) -> Path:
        return self.scratch / f"{index:05d}"


def _layer(job: _Job, index: int, advance: Advance) -> None:
    """Quantise a layer, run it as it is then, and write its file."""
    started = time.monotonic()
    work = job.work(index, lambda part: advance((index + part) / len(job.files)))
    work.folder.mkdir(parents=True, exist_ok=True)
    with _rounded(job) as taken, job.replay.turn(index):
        tensors, matrices = quantise(work)
        tensors |= taken.get(work.name, {})
        work.leave()
    if job.ranks.rank == 0:
        _write(job.files[index], tensors, LayerReport(index, work.name, tuple(matrices), time.monotonic() - started))
        if work.before is not None and work.before != job.encoded:
            shutil.rmtree(work.before)
        work.clear()
    job.ranks.wait()


def _rest(job: _Job) -> None:
    """Write the file of what lies outside the layers, and remove what is no longer needed."""
    if job.ranks.rank == 0:
        if not _is_whole(job.rest):
            tensors: dict[str, Any] = {}
            for path in job.replay.outside:
                with _rounded(job) as taken, job.replay.read(path):
                    tensors |= taken.get(path, {})
            _write(job.rest, tensors, LayerReport(None, "", (), 0.0))
        shutil.rmtree(job.scratch, ignore_errors=True)
    job.ranks.wait()


@contextmanager
def _rounded(job: _Job) -> Iterator[dict[str, dict[str, Any]]]:
    """Inside, what is no expert's is rounded whenever it has been read; gives what to store of it, by its module.

    Raises:
        InputError: some of it is not finite; names the tensor on disk and its file.
    """
    taken: dict[str, dict[str, Any]] = {}
    replay, dense = job.replay, job.settings.dense
    tied = replay.model.all_tied_weights_keys

    def prepare(name: str, module: nn.Module) -> None:
        weights = {f"{name}.{key}".removeprefix("."): value for key, value in module.state_dict().items()}
        mine = replay.outside.get(name, weights.keys() - candidates(name, module).keys())
        mine = {each for each in mine if each not in tied}
        for each in sorted(mine):
            require_finite(replay, weights[each], [each])
        if dense is not None:
            taken[name] = dense.take(name, module, lambda each: each not in mine)

    replay.prepare = prepare
    yield taken


def _micro_batches(tokens_BL: Ids, settings: Settings) -> list[Tokens]:
    size = settings.sequences(max(part.shape[1] for part in parts(tokens_BL)))
    split = list(zip(*(torch.from_numpy(part).split(size) for part in parts(tokens_BL)), strict=True))
    return [(batch[0], batch[1]) if len(batch) == 2 else batch[0] for batch in split]


def _check(replay: Replay, tokens_BL: Ids) -> None:
    """Refuse a model without experts to quantise, and ids that are none of its."""
    if not any(candidates(name, layer) for name, layer in zip(replay.names, replay.layers, strict=True)):
        raise InputError(
            f"{escape(replay.checkpoint.name)} has no experts whose matrices can be quantised.",
            "It is dense, or its experts are no matrices that a module of experts holds.",
            "Give a Mixture-of-Experts model.",
        )
    for ids_BL in parts(tokens_BL):
        check_ids(replay.checkpoint, replay.model, ids_BL)


def is_finished(folder: Path) -> bool:
    """Whether all files of a run were there once."""
    return (folder / _REST).exists()


def discard(folder: Path) -> None:
    """Remove the files of a run; that it was finished goes first."""
    (folder / _REST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def folder_of(checkpoint: Checkpoint, tokens_BL: Ids, method: Method, settings: Settings, place: Path) -> Path:
    """The folder of a run: its name follows from all that decides the files in it."""
    decides = {
        **identity(checkpoint),
        "tokens": [tokens_identity(part) for part in parts(tokens_BL)],
        "settings": settings.to_json(),
        "method": method.to_json(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return place / f"layers-{key[:16]}"


def _write(path: Path, tensors: dict[str, Any], report: LayerReport) -> None:
    arrays = {name: to_numpy(value) if isinstance(value, Tensor) else value for name, value in tensors.items()}
    data = save(in_order(arrays), to_metadata(report))
    digest = hashlib.sha256(data).hexdigest()
    if _noted(path) != digest:
        write_whole(note_file(path), json.dumps({"seconds": report.seconds, "sha256": digest}).encode())
    write_whole(path, data)


def _is_whole(path: Path) -> bool:
    """Whether a file is there as it was written."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == _noted(path)


def _noted(path: Path) -> str | None:
    """The hash that is kept beside a file."""
    try:
        return str(json.loads(note_file(path).read_bytes())["sha256"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
