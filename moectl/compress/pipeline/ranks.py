"""Several processes of one run, started by torchrun, that share a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from moectl.errors import MachineError
from moectl.launched import local_rank, rank_and_size

_PATIENCE = timedelta(days=30)
"""One process may wait for another's experts for hours; when that one ends, the others notice at once."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    size: int = 1

    def mine(self, count: int) -> range:
        """Those of `count` pieces of work of about the same size that are this process's."""
        return range(self.rank, count, self.size)

    def shared(self, loads: Sequence[int]) -> list[int]:
        """Those of pieces of work of different sizes that are this process's: the next largest goes to the idlest."""
        taken = [0] * self.size
        mine = []
        for place in sorted(range(len(loads)), key=lambda place: (-loads[place], place)):
            rank = min(range(self.size), key=lambda rank: (taken[rank], rank))
            taken[rank] += loads[place] + 1
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)

    def device(self, device: torch.device | str) -> torch.device:
        """Where this process computes: each has a GPU of its own."""
        device = torch.device(device)
        if device.type != "cuda" or self.size == 1:
            return device
        return torch.device("cuda", local_rank())

    def wait(self) -> None:
        """Return when all processes are here.

        Raises:
            MachineError: one of them has ended.
        """
        if self.size > 1:
            try:
                distributed.barrier()
            except RuntimeError as error:
                raise MachineError(
                    "Another process of this run has ended.",
                    "They work on one model together; finished layers are kept.",
                    "See what it said, mend that, and run the same command again to go on.",
                ) from error


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that torchrun started; one without it."""
    rank, size = rank_and_size()
    started = size > 1 and not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, size)
    finally:
        if started:
            distributed.destroy_process_group()
