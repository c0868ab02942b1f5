"""What a training leaves behind so that it can go on: DCP checkpoints beside OUT, and which of them is the last.

`OUT.partial/checkpoints/step-00000100/` holds the shards of torch.distributed.checkpoint, which any number of processes
can read, and `state.json`: the step, and where each part of the data stands. It is written under another name and
renamed when it is whole and on the disk; `latest` is replaced by a rename too. Whatever happens at whatever moment,
`latest` names a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from moectl.checkpoint.fs import FileSystem
from moectl.data.tokens import Position
from moectl.training.world import World

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """The checkpoints of one training in `directory`, the newest `keep` of them.

    With `trained_only` they leave out the parameters without gradients, as those of an adapter's base model.
    """

    def __init__(self, directory: Path, world: World, *, keep: int, trained_only: bool = False) -> None:
        self.directory = directory
        self.world = world
        self.keep = keep
        self._options = StateDictOptions(ignore_frozen_params=trained_only, strict=not trained_only)
        self._fs = FileSystem()

    def latest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        pointer = self.directory / "latest"
        return self.directory / pointer.read_text().strip() if pointer.exists() else None

    def where(self) -> tuple[int, list[Position] | None]:
        """After which step the newest checkpoint was taken, or 0, and where each part of the data stood."""
        path = self.latest()
        if path is None:
            return 0, None
        state = json.loads((path / "state.json").read_text())
        return int(state["step"]), [Position(*place) for place in state["data"]]

    def save(self, step: int, places: Sequence[Position], model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """Write what `load` needs to go on after `step`, by all processes together."""
        target = self.directory / f"step-{step:08}"
        work = target.with_suffix(".writing")
        if self.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._fs.remove_tree(work)
        self.world.barrier()
        _quietly(state_dict_saver.save, self._state(model, optimizer), checkpoint_id=work)
        if self.world.is_main:
            (work / "state.json").write_text(json.dumps({"step": step, "data": places}) + "\n")
            for path in work.iterdir():
                _sync(path)
            self._fs.sync_directory(work)
            self._fs.remove_tree(target)
            self._fs.rename(work, target)
            self._point_to(target.name)
            self._forget(target.name)
        self.world.barrier()
        return target

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the newest checkpoint, if there is one."""
        path = self.latest()
        if path is None:
            return
        state = self._state(model, optimizer)
        _quietly(state_dict_loader.load, state, checkpoint_id=path)
        set_model_state_dict(model, state["model"], options=self._options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)

    def _state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        # Asking an optimiser that has not stepped yet for its state makes it up, with gradients of zero.
        return {
            "model": get_model_state_dict(model, options=self._options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_OPTIONS),
        }

    def _point_to(self, name: str) -> None:
        pointer = self.directory / "latest"
        work = pointer.with_suffix(".writing")
        work.write_text(name + "\n")
        _sync(work)
        self._fs.rename(work, pointer)
        self._fs.sync_directory(self.directory)

    def _forget(self, latest: str) -> None:
        """Remove all but the newest, and what was left half written or half removed."""
        whole = sorted(path for path in self.directory.glob("step-*") if not path.suffix)
        for path in whole[: -self.keep]:
            if path.name != latest:
                # Renamed first: a directory that is removed in part must not look like a checkpoint.
                self._fs.rename(path, path.with_suffix(".removing"))
        for path in self.directory.glob("step-*.*"):
            shutil.rmtree(path)


def whole_model(model: nn.Module) -> dict[str, Any]:
    """Every tensor of a model, gathered to the CPU of the first process; empty in the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def _quietly(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with warnings.catch_warnings():
        # A single process without a process group is what we mean, and DCP warns that it is assumed.
        warnings.simplefilter("ignore")
        function(*arguments, **named)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
