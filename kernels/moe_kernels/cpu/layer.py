"""The expert layer forward on a CPU.

    x --gather--> x_n --W_up--> h --activation--> a --W_down--> out_S --weighted sum per token--> y

Neighbouring experts are taken together until they have ROWS rows, so that with few rows per expert the activation is
one call over all of them, and with many rows what lies between two products stays in the cache.

Legend: T tokens, D hidden_size, F expert width, G rows of the up-projection (2F with a gate), E experts, K top-k,
S = T*K routed rows, n rows of one run of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_kernels.cpu.products import Matrices, sizes
from moe_kernels.dispatch import Dispatch

Activate = Callable[[Tensor, bool], Tensor]

ROWS = 1024
# Up to here sorting and gathering cost more than reading an expert twice.
SINGLE_ROWS = 8


class Projection(Protocol):
    """All experts' matrices of one projection, in whatever form they are stored."""

    count: int
    outputs: int

    def product(self, expert: int, x_nD: Tensor, out_nN: Tensor) -> None:
        """The product of one expert with at least one row."""

    def products(self, first: int, sizes: list[int], x_SD: Tensor, out_SN: Tensor) -> None:
        """The products of neighbouring experts, from `first` on, with `sizes` rows each."""


def forward(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: Activate,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Dispatch | None]:
    """y [T, D], and with `save` what `backward` takes: h [S, G], the up-projection by place, and the dispatch."""
    few = index_TK.numel() <= SINGLE_ROWS
    up, down = Matrices(gate_up_EGD, gate_up_bias_EG, few), Matrices(down_EDF, down_bias_ED, few)
    if not save:
        return run(x_TD, up, down, index_TK, weight_TK, activation, interleaved), None, None
    grouping = Grouping.of(index_TK, up.count)
    h_SG = x_TD.new_empty(grouping.rows, up.outputs)
    h_SG[grouping.bounds[-1] :] = 0
    y_TD = run_grouped(x_TD, up, down, grouping, weight_TK, activation, interleaved, h_SG)
    return y_TD, h_SG, grouping.dispatch()


def run(
    x_TD: Tensor,
    up: Projection,
    down: Projection,
    index_TK: Tensor,
    weight_TK: Tensor,
    activation: Activate,
    interleaved: bool,
) -> Tensor:
    """y [T, D], without anything for a backward."""
    if 0 < index_TK.numel() <= SINGLE_ROWS:
        return _run_single(x_TD, up, down, index_TK, weight_TK, activation, interleaved)
    return run_grouped(x_TD, up, down, Grouping.of(index_TK, up.count), weight_TK, activation, interleaved, None)


def _run_single(
    x_TD: Tensor,
    up: Projection,
    down: Projection,
    index_TK: Tensor,
    weight_TK: Tensor,
    activation: Activate,
    interleaved: bool,
) -> Tensor:
    """`run` row by row in the order of the tokens."""
    top_k = index_TK.shape[1]
    experts = [(s, e) for s, e in enumerate(index_TK.flatten().tolist()) if 0 <= e < up.count]
    h_SG, out_SD = (x_TD.new_zeros(index_TK.numel(), matrices.outputs) for matrices in (up, down))
    for s, e in experts:
        up.product(e, x_TD[s // top_k, None], h_SG[s, None])
    a_SF = activation(h_SG, interleaved)
    for s, e in experts:
        down.product(e, a_SF[s, None], out_SD[s, None])
    wide = torch.promote_types(out_SD.dtype, weight_TK.dtype)
    return torch.bmm(weight_TK[:, None].to(wide), out_SD.view(len(x_TD), top_k, -1).to(wide)).squeeze(1).to(x_TD.dtype)


def run_grouped(
    x_TD: Tensor,
    up: Projection,
    down: Projection,
    grouping: Grouping,
    weight_TK: Tensor,
    activation: Activate,
    interleaved: bool,
    h_SG: Tensor | None,
) -> Tensor:
    """y [T, D]; fills h_SG by place if it is given."""
    out_SD = x_TD.new_empty(grouping.rows, down.outputs)
    out_SD[grouping.bounds[-1] :] = 0
    token_S = grouping.token
    for first, counts, start, end in grouping.runs():
        h_nG = x_TD.new_empty(end - start, up.outputs) if h_SG is None else h_SG[start:end]
        up.products(first, counts, x_TD.index_select(0, token_S[start:end]), h_nG)
        down.products(first, counts, activation(h_nG, interleaved), out_SD[start:end])
    return grouping.combine(out_SD, weight_TK)


@dataclass(frozen=True)
class Grouping:
    """The routed rows by expert, as a CPU needs them.

    Attributes:
        row: [S] int64; row[place] = t*K + k, those that no expert here takes at the end.
        bounds: E+1 places; expert e has bounds[e]..bounds[e+1].
        top_k: K.
    """

    row: Tensor
    bounds: list[int]
    top_k: int

    @classmethod
    def of(cls, index_TK: Tensor, experts: int) -> Grouping:
        """A stable sort of the ids; those outside 0..E-1 come last."""
        flat = index_TK.reshape(-1).long()
        key, row = torch.where((flat >= 0) & (flat < experts), flat, experts).sort(stable=True)
        bounds = torch.searchsorted(key, torch.arange(experts + 1, dtype=key.dtype))
        return cls(row, bounds.tolist(), index_TK.shape[1])

    @classmethod
    def from_dispatch(cls, plan: Dispatch) -> Grouping:
        """The same from a Dispatch."""
        return cls(plan.row.long(), plan.offsets.tolist(), plan.top_k)

    @property
    def rows(self) -> int:
        """S."""
        return len(self.row)

    @property
    def token(self) -> Tensor:
        """[S]; the token of each place."""
        return self.row // self.top_k

    def inverse(self) -> Tensor:
        """[T, K]; the place of each choice."""
        inverse_S = torch.empty_like(self.row)
        inverse_S[self.row] = torch.arange(self.rows)
        return inverse_S.view(-1, self.top_k)

    def runs(self) -> Iterator[tuple[int, list[int], int, int]]:
        """Neighbouring experts with ROWS rows together: the first expert, rows of each, first and last place."""
        counts = sizes(self.bounds)
        first = 0
        for last, end in enumerate(self.bounds[1:]):
            start = self.bounds[first]
            if end - start >= ROWS or (last == len(counts) - 1 and end > start):
                yield first, counts[first : last + 1], start, end
                first = last + 1

    def combine(self, rows_SD: Tensor, weight_TK: Tensor | None) -> Tensor:
        """Each token's rows, weighted and summed in float32 and rounded once: [T, D].

        An embedding bag is just that, and at T = 2048 two (float32) to ten times (bfloat16) faster than index_add_.
        """
        inverse_TK = self.inverse()
        if len(inverse_TK) == 0:
            return rows_SD.new_zeros(0, rows_SD.shape[1])
        wide = rows_SD.dtype if weight_TK is None else torch.promote_types(rows_SD.dtype, weight_TK.dtype)
        weight = None if weight_TK is None else weight_TK.to(wide).contiguous()
        bag = torch.nn.functional.embedding_bag
        return bag(inverse_TK, rows_SD.to(wide), mode="sum", per_sample_weights=weight).to(rows_SD.dtype)

    def dispatch(self) -> Dispatch:
        """The same as the Dispatch that every device's backward takes."""
        offsets = torch.tensor(self.bounds, dtype=torch.int32)
        inverse = self.inverse().flatten()
        inverse = torch.where(inverse < self.bounds[-1], inverse, -1).int()
        none = offsets.new_empty(0)
        return Dispatch(offsets, self.row.int(), inverse, none.view(0, 2), none.clone(), self.top_k, 0)
