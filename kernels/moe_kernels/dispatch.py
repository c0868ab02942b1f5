"""Who goes where: rows of a batch grouped by expert, without leaving the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Routed rows s = t*K + k grouped by expert, in their old order within one expert.

    Attributes:
        offsets: [E+1] int32; expert e has the places offsets[e]..offsets[e+1]. Places from offsets[E] on are not in use.
        row: [S] int32; row[place] = t*K + k.
        inverse: [S] int32; inverse[t*K + k] = place, or -1 for a row that no expert here takes (id < 0 or >= E).
        top_k: K.
    """

    offsets: Tensor
    row: Tensor
    inverse: Tensor
    top_k: int

    @property
    def token(self) -> Tensor:
        """[S]; the token of each place."""
        return self.row // self.top_k


def dispatch(index_TK: Tensor, num_experts: int) -> Dispatch:
    """Group the rows of `index_TK` [T, K] by expert (stable counting sort; ids outside 0..E-1 are dropped)."""
    flat = index_TK.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    row = key.argsort(stable=True).int()
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = torch.bincount(key, minlength=num_experts + 1)[:num_experts].cumsum(0)
    inverse = torch.empty_like(row)
    inverse[row.long()] = torch.arange(len(row), dtype=torch.int32, device=flat.device)
    inverse[key == num_experts] = -1
    return Dispatch(offsets, row, inverse, index_TK.shape[1])
