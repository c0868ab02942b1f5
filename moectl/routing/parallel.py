"""Several processes, started by torchrun, that each record some of the documents.

With expert parallelism inside the model nothing changes here: choices are read before they are sent anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed

from moectl.launched import local_rank, rank_and_size
from moectl.routing.recorder import merged
from moectl.traces.store import Recording


def own_device(device: torch.device) -> torch.device:
    """The device of this process: each has a GPU of its own."""
    if device.type != "cuda" or rank_and_size()[1] == 1:
        return device
    return torch.device("cuda", local_rank())


def gathered(recordings: Mapping[str, Recording]) -> dict[str, Recording]:
    """The recordings of all processes as one, in the first process; nothing in the others."""
    rank, size = rank_and_size()
    if size == 1:
        return dict(recordings)
    started = not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo")
    group = distributed.new_group(backend="gloo")
    everyones: list[Mapping[str, Recording]] = [{}] * size
    distributed.gather_object(recordings, everyones if rank == 0 else None, group=group)
    if started:
        distributed.destroy_process_group()
    if rank:
        return {}
    return {stream: merged([each[stream] for each in everyones]) for stream in recordings}
