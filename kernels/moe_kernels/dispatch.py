"""Who goes where: rows of a batch grouped by expert, without leaving the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels import target

SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Dispatch:
    """Routed rows s = t*K + k grouped by expert, in their old order within one expert.

    Attributes:
        offsets: [E+1] int32; expert e has the places offsets[e]..offsets[e+1]. No place from offsets[E] on is in use.
        row: [S] int32; row[place] = t*K + k.
        inverse: [S] int32; inverse[t*K + k] = place, or -1 for a row that no expert here takes (id < 0 or >= E).
        schedule: [E + S//16, 2] int32; the i-th row block is block schedule[i, 1] of expert schedule[i, 0], for the
            first `n_blocks` lines; nothing on a CPU.
        n_blocks: [1] int32; how many row blocks there are; nothing on a CPU.
        top_k: K.
        block_m: rows of a row block.
    """

    offsets: Tensor
    row: Tensor
    inverse: Tensor
    schedule: Tensor
    n_blocks: Tensor
    top_k: int
    block_m: int

    @property
    def token(self) -> Tensor:
        """[S]; the token of each place."""
        return self.row // self.top_k

    @property
    def in_use(self) -> Tensor:
        """[S]; whether each place is in use."""
        return torch.arange(len(self.row), device=self.row.device) < self.offsets[-1]

    @property
    def expert(self) -> Tensor:
        """[S] int64; the expert of each place, the last one where none is."""
        place = torch.arange(len(self.row), dtype=self.offsets.dtype, device=self.row.device)
        return torch.searchsorted(self.offsets[1:], place, right=True).clamp(max=self.num_experts - 1)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.offsets) - 1

    @property
    def most_blocks(self) -> int:
        """The most row blocks these many rows can make: what a grid is sized by, for nobody waits for `n_blocks`."""
        rows = len(self.row)
        return min(rows, self.num_experts + rows // self.block_m)


def dispatch(index_TK: Tensor, num_experts: int, block_m: int = 128) -> Dispatch:
    """Group the rows of `index_TK` [T, K] by expert: a stable counting sort, on a GPU without a synchronisation.

    Ids outside 0..E-1, as expert parallelism has them for other ranks, are dropped.
    """
    if target.uses_triton(index_TK):
        from moe_kernels.gpu.dispatch import launch

        return launch(index_TK, num_experts, block_m)
    flat = index_TK.reshape(-1).long()
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    row = key.argsort(stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = torch.bincount(key, minlength=num_experts + 1)[:num_experts].cumsum(0)
    inverse = torch.empty(len(row), dtype=torch.int32, device=flat.device)
    inverse[row] = torch.arange(len(row), dtype=torch.int32, device=flat.device)
    inverse[key == num_experts] = -1
    return Dispatch(
        offsets, row.int(), inverse, offsets.new_empty(0, 2), offsets.new_empty(0), index_TK.shape[1], block_m
    )
