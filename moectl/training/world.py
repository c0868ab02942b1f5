"""The processes of one training: their rank, their device, and the few things they say to each other.

One process needs no launcher. Under `torchrun` the model is sharded over all of them with FSDP2 (`fully_shard`) and
each takes its slice of every batch. The one file that calls torch.distributed, but for checkpoints and for what routers
count over all processes (`moectl.routers.processes`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from moectl.errors import MachineError, MoectlError, SaidElsewhere, UsageError
from moectl.launched import local_rank, rank_and_size
from moectl.text import escape, reason

PATIENCE = timedelta(hours=4)
"""How long processes wait for one another, as all do while the first one writes the output. NCCL's ten minutes are too
short for that with a large model; a process that ended is noticed at once either way."""

COURTESY = 2.0
"""Seconds that a process which says nothing leaves to the one that says why all of them end."""


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

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What fails in one process fails in all of them, of which one says why: the first that failed by itself.

        Inside the processes may not speak to each other: those that fail would be waited for in vain.

        Raises:
            SaidElsewhere: in the others.
        """
        problem: MoectlError | OSError | None = None
        try:
            yield
        except (MoectlError, OSError) as error:
            problem = error
        code_P = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        code_P[self.rank] = getattr(problem, "exit_code", MachineError.exit_code) if problem else 0
        try:
            codes = self.sum(code_P).tolist()
        except RuntimeError:  # another one is lost, which matters less than what is known
            if problem:
                raise problem from None
            raise
        speaker = next((rank for rank, code in enumerate(codes) if code), None)
        if speaker is not None:
            raise problem if problem and speaker == self.rank else SaidElsewhere(codes[speaker])

    def said_once(self, error: MoectlError) -> MoectlError:
        """What to raise of an error that all processes have found: the first one says it."""
        return error if self.is_main else SaidElsewhere(error.exit_code)

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
        SaidElsewhere: another process of this machine says so.
        UsageError: the device is no device.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World(0, 1, _device(device, None))
        return
    with _courtesy():
        try:
            chosen = _device(device, local_rank())
        except MoectlError as error:  # as all processes of a machine find, before they can speak to each other
            raise SaidElsewhere(error.exit_code) if local_rank() else error from None
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
        with _courtesy():
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


@contextmanager
def _courtesy() -> Iterator[None]:
    """Let the process that says why all of them end be the first: torchrun ends all when one has ended."""
    try:
        yield
    except SaidElsewhere:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(COURTESY)
        raise


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
