"""Second moments of what experts' matrices are given: the Hessians of GPTQ, a batch of experts at a time.

Legend: T tokens, K experts per token, S rows, D hidden, G experts of the batch, N inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moectl.compress.pipeline.stacks import Stack
from moectl.compress.pipeline.watch import Product, Watch
from moectl.errors import InputError

_ROWS = 2048
"""Rows that experts are given at once."""

_PER_TOKEN = {"LongcatFlashExperts": 2}
"""Experts that have to be given more than one choice per token: the same again, whose rows come after all others."""


@dataclass(frozen=True)
class Moments:
    """X^T X of the rows X that each expert of a batch is given, for every stack.

    Attributes:
        stacks: their order is that of the lists here.
        start: the first expert of the batch.
        hessians: [G, N, N] float32; G is less where a stack has fewer experts.
        counts: rows they are of, [G].
    """

    stacks: Sequence[Stack]
    start: int
    hessians: Sequence[Tensor]
    counts: Sequence[Tensor]

    @classmethod
    def none(cls, stacks: Sequence[Stack], start: int, stop: int, device: torch.device | str) -> Moments:
        """Before any row, for experts start to stop."""
        sizes = [max(0, min(stop, stack.experts) - start) for stack in stacks]
        zeros = [torch.zeros(g, s.inputs, s.inputs, device=device) for g, s in zip(sizes, stacks, strict=True)]
        return cls(stacks, start, zeros, [torch.zeros(g, dtype=torch.int64) for g in sizes])

    def slot(self, product: Product) -> tuple[int, int] | None:
        """The stack of a product's matrix and the place of its expert in the batch; None if it is not of the batch."""
        for place, stack in enumerate(self.stacks):
            if product.name in stack.names:
                at = stack.names.index(product.name) + product.number - self.start
                return (place, at) if 0 <= at < len(self.counts[place]) else None
        return None

    def add(self, place: int, at: int, x_SN: Tensor) -> None:
        """Add rows of an expert."""
        self.hessians[place][at].addmm_(x_SN.mT, x_SN)
        self.counts[place][at] += len(x_SN)


Given = tuple[Tensor, Tensor, Tensor]
"""What a module of experts was given: hidden states [T, D], index [T, K], weights [T, K]."""


def from_choices(
    moments: Moments,
    experts: nn.Module,
    parameters: Mapping[str, Tensor],
    given: Iterable[Given],
    cap: int,
    *,
    last: Collection[str] = (),
    all_experts: bool,
    gate_weighted: bool,
) -> None:
    """Add what the experts of a module are given, each shown its rows of the files again, at most `cap`.

    Args:
        last: names of matrices whose products need not be computed, for nothing that is seen follows from them.
        all_experts: show each expert the rows of all tokens.
        gate_weighted: count a row as often as its weight says.

    Raises:
        InputError: a matrix of an expert that is shown rows is not seen to be multiplied with as many.
    """
    left = [cap] * max(len(counts) for counts in moments.counts)
    for x_TD, index_TK, weight_TK in given:
        for row_S, expert_S, gate_S in _rows(index_TK, weight_TK, moments.start, left, all_experts):
            gates = {expert: gate_S[expert_S == expert].abs().sqrt()[:, None] for expert in expert_S.unique().tolist()}

            def see(product: Product, gates: Mapping[int, Tensor] = gates) -> None:
                slot = moments.slot(product)
                if slot is not None:
                    gate_S1 = gates[moments.start + slot[1]].float()
                    x_SN = product.x_SN[: len(gate_S1)].float()
                    moments.add(*slot, x_SN * gate_S1 if gate_weighted else x_SN)

            with Watch(parameters, see, last):
                show(experts, x_TD[row_S], expert_S)
    shown = cap - torch.tensor(left)
    matrices = min(len(counts) for counts in moments.counts)  # more experts than those compute nothing
    if any((counts[:matrices] != shown[:matrices]).any() for counts in moments.counts):
        raise InputError(
            f"Not all that {type(experts).__name__} multiplies its matrices with can be seen.",
            "They cannot be quantised by what they are given.",
            "Report it: its family needs support of its own.",
        )


def _rows(
    index_TK: Tensor, weight_TK: Tensor, start: int, left: list[int], all_experts: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of one file for the experts from `start` on, in order: (row [S], expert [S], gate [S]); lowers `left`."""
    parts = []
    for at in range(len(left)):
        chosen_TK = (index_TK == start + at) & (weight_TK != 0)
        gate_T = (weight_TK * chosen_TK).sum(-1)
        row_S = (
            torch.arange(len(index_TK), device=index_TK.device) if all_experts else chosen_TK.any(-1).nonzero()[:, 0]
        )
        row_S = row_S[: left[at]]
        left[at] -= len(row_S)
        parts.append((row_S, torch.full_like(row_S, start + at), gate_T[row_S]))
    row_S, expert_S, gate_S = (torch.cat(each) for each in zip(*parts, strict=True))
    yield from zip(row_S.split(_ROWS), expert_S.split(_ROWS), gate_S.split(_ROWS), strict=True)


def show(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> None:
    """Give rows [S, D] to one expert each: the module itself, called as for a single expert per token."""
    if isinstance(experts, nn.ModuleDict):  # Switch
        for number, expert in enumerate(experts.values()):
            if (expert_S == number).any():
                expert(x_SD[expert_S == number])
        return
    times = _PER_TOKEN.get(type(experts).__name__, 1)
    index_SK = expert_S[:, None].expand(-1, times)
    experts(x_SD, index_SK, torch.ones_like(index_SK, dtype=x_SD.dtype))


def from_passes(
    moments: Moments, parameters: Mapping[str, Tensor], passes: Iterable[Callable[[], Any]], caps: Sequence[int]
) -> None:
    """Add what the experts of the batch are given while the passes run, at most `caps` rows of each, by stack.

    Rows of zeros are what some families give an expert for the tokens of the others, and do not count.
    """

    def see(product: Product) -> None:
        slot = moments.slot(product)
        if slot is not None:
            place, at = slot
            x_SN = product.x_SN.float()
            x_SN = x_SN[(x_SN != 0).any(-1)][: caps[place] - int(moments.counts[place][at])]
            moments.add(place, at, x_SN)

    for run in passes:
        with Watch(parameters, see):
            run()
