"""The processes of one training: their rank, their device, and the few things they say to each other.

One process needs no launcher. Under `torchrun` the model is sharded over all of them with FSDP2 (`fully_shard`) and
each takes its slice of every batch. The one file that calls torch.distributed, but for checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from moectl.errors import MachineError, UsageError
from moectl.text import escape, reason

PATIENCE = timedelta(hours=4)
"""How long processes wait for one another, as all do while the first one writes the output. NCCL's ten minutes are too
short for that with a large model; a process that ended is noticed at once either way."""


@dataclass(frozen=True)
class World:
    """This process among `size`; `device` is where its share of the model lives."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place; exact for integers."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item()) if self.size > 1 else flag

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            self.sum(torch.zeros((), device=self.device)).item()

    def shard(self, model: nn.Module, layers: nn.ModuleList, whole: set[nn.Parameter]) -> None:
        """Shard a model on the meta device over all processes, in pieces of one decoder layer.

        `whole` are parameters that every process keeps as they are.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("fsdp",))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole & set(layer.parameters()))
        fully_shard(model, mesh=mesh, ignored_params=whole)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Raises:
        MachineError: the device is not there, or another process was lost or not found.
        UsageError: the device is no device.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"Process {rank} of {size} could not join the others: {reason(error, 200)}",
            "WORLD_SIZE says that there are others, whom torchrun tells where to meet.",
            "Start all of them with torchrun, or unset WORLD_SIZE to train in one process.",
        ) from error
    try:
        yield World(rank, size, chosen)
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            raise
        raise MachineError(
            f"Process {rank} of {size} lost another one: {reason(error, 200)}",
            "All of them are needed for every step; torchrun names the one that ended first.",
            "The same command resumes from the last checkpoint, on any number of processes.",
        ) from error
    finally:
        distributed.destroy_process_group()


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{escape(name)!r} is no device.", "", "Give auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MachineError("There is no CUDA device.", "torch sees none.", "Train with --device cpu.")
    if device.type == "cuda" and local_rank is not None:
        return torch.device("cuda", local_rank)
    return device
