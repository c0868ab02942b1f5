"""What routers share that weigh all experts and leave out those of weight 0."""

from __future__ import annotations

from torch import Tensor

from moectl.routers.protocol import NO_EXPERT


def ranked(weight_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Index and weight of all experts, the heaviest first, [T, E] both; NO_EXPERT in place of those of weight 0."""
    index_TE = weight_TE.argsort(dim=-1, descending=True, stable=True)
    weight_TE = weight_TE.gather(-1, index_TE)
    return index_TE.masked_fill(weight_TE == 0, NO_EXPERT), weight_TE
