"""What routers count over all processes of a training: each holds some of the tokens of a step.

Nothing is exchanged where torch.distributed was not started. Legend: T tokens, E experts, K choices, P processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from moectl.routers.protocol import counts


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, in place; exact for integers."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


def tokens(number: int, device: torch.device) -> int:
    """How many tokens all processes hold together."""
    return int(summed(torch.tensor(number, device=device)))


def queued_before(index_TK: Tensor, num_experts: int) -> Tensor:
    """How many assignments of *other* processes stand before this one's first in each expert's queue, int64 [K, E].

    All first choices queue before any second one, and within a rank the processes in their order: as if the tokens of
    all were one batch, the first process's first.
    """
    own_KE = torch.stack([counts(index_T, num_experts) for index_T in index_TK.unbind(1)])
    if not distributed.is_initialized():
        return torch.zeros_like(own_KE)
    every_PKE = own_KE.new_empty(distributed.get_world_size(), *own_KE.shape)
    distributed.all_gather(list(every_PKE), own_KE)
    earlier_PKE = every_PKE.cumsum(1) - every_PKE
    others_KE = earlier_PKE.sum(0) - (own_KE.cumsum(0) - own_KE)
    return others_KE + every_PKE[: distributed.get_rank()].sum(0)
