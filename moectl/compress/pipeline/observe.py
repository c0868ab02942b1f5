"""What the experts of a layer are given on the calibration tokens, and how their matrices lie in the parameters.

Legend: T tokens, D hidden, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moectl.compress.pipeline.finite import overflow
from moectl.compress.pipeline.layer import LayerWork
from moectl.compress.pipeline.moments import Given, show
from moectl.compress.pipeline.stacks import Seen, Stack, stacks_of
from moectl.compress.pipeline.watch import Product, Watch
from moectl.errors import InputError, UsageError
from moectl.layerwise.experts import choice
from moectl.layerwise.malloc import give_back
from moectl.layerwise.replay import Left
from moectl.layerwise.stored import read_tree, write_tree
from moectl.text import escape

_CHOSEN = ""
"""In the place of a parameter's name: rows by expert, where a choice says so."""


@dataclass(frozen=True)
class Observed:
    """What is known of a layer's experts when all tokens have been seen.

    Attributes:
        stacks: their matrices.
        tokens: rows that each expert's was multiplied with, [E] by stack.
        last: names of the matrices that an expert multiplies with last: nothing that is seen follows from the products.
    """

    stacks: list[Stack]
    tokens: list[Tensor]
    last: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        """How many there are; some stacks can have fewer."""
        return max(stack.experts for stack in self.stacks)


def observe(work: LayerWork) -> Observed:
    """Run all micro-batches as far as the experts, and keep what these are given in files.

    Raises:
        InputError: activations are not finite, or what experts are given cannot be seen.
        UsageError: the settings want more than can be seen.
    """
    settings = work.settings
    if work.experts is None and (settings.all_experts or settings.gate_weighted):
        raise UsageError(
            f"{escape(work.replay.checkpoint.name)} can be calibrated neither on all tokens nor by gates.",
            "Its experts are not given rows, numbers and weights, so they can only be watched as they run.",
            "Leave out --all-experts and --gate-weighted.",
        )
    for number in work.ranks.mine(len(work.batches)):
        if not work.file("seen", number).exists():
            write_tree(work.file("seen", number), _observe(work, number))
            give_back()
        work.advance(0.25 * number / len(work.batches))
    work.ranks.wait()
    seen: dict[str, Seen] = {}
    tokens: dict[str, Tensor] = {}
    for number in range(len(work.batches)):
        how, counts = read_tree(work.file("seen", number))
        seen |= {name: Seen(*each) for name, each in how.items()}
        tokens |= {name: tokens.get(name, 0) + each for name, each in counts.items()}
    stacks = stacks_of(work.parameters, seen)
    if not stacks:
        raise InputError(
            f"{escape(work.replay.checkpoint.name)}: layer {work.index} multiplies nothing with its experts.",
            "What they are given cannot be seen, so there is nothing to quantise them by.",
            "Report it: its family needs support of its own.",
        )
    if work.experts is None:
        none = torch.zeros(1, dtype=torch.int64)
        return Observed(stacks, [torch.cat([tokens.get(name, none) for name in stack.names]) for stack in stacks])
    least = min(stack.experts for stack in stacks)  # experts beyond those compute nothing
    chosen_E = tokens[_CHOSEN][:least]
    last = next(stack.names for stack in stacks if list(seen)[-1] in stack.names)
    return Observed(stacks, [functional.pad(chosen_E, (0, stack.experts - least)) for stack in stacks], last)


def all_given(work: LayerWork) -> Iterator[Given]:
    """What the experts were given, micro-batch by micro-batch."""
    for number in range(len(work.batches)):
        if read_tree(work.file("seen", number))[1]:  # else they were not called
            found = read_tree(work.file("given", number))
            x_TD, index_TK, weight_TK = (part.to(work.settings.device) for part in found)
            yield x_TD, index_TK, weight_TK


def _observe(work: LayerWork, number: int) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """How the parameters that a micro-batch is multiplied with hold R x N matrices, and with how many rows each is."""
    how: dict[str, tuple[int, int, bool]] = {}
    counts: dict[str, Tensor] = {}

    def see(product: Product) -> None:
        outputs, inputs = product.outputs, product.x_SN.shape[-1]
        how[product.name] = outputs, inputs, product.transposed
        none = torch.zeros(work.parameters[product.name].numel() // (outputs * inputs), dtype=torch.int64)
        counts.setdefault(product.name, none)[product.number] += int((product.x_SN != 0).any(-1).sum())

    if work.experts is None:
        with Watch(work.parameters, see):
            work.run(number)
        return how, counts
    given = _given(work, work.experts, number)
    if given is None:
        return {}, {}
    x_TD, index_TK, weight_TK = given
    with Watch(work.parameters, see):
        show(work.experts, torch.zeros_like(x_TD[:1]), torch.zeros_like(index_TK[:1, 0]))
    experts = max(
        stack.experts for stack in stacks_of(work.parameters, {name: Seen(*each) for name, each in how.items()})
    )
    there_TK = (index_TK >= 0) & (index_TK < experts) & (weight_TK != 0)
    sent_TE = torch.zeros(len(index_TK), experts + 1, dtype=torch.bool, device=index_TK.device)
    sent_TE.scatter_(1, torch.where(there_TK, index_TK, experts), True)
    write_tree(work.file("given", number), given)
    return how, {_CHOSEN: sent_TE[:, :-1].sum(0)}


def _given(work: LayerWork, experts: nn.Module, number: int) -> Given | None:
    """What the experts are given of a micro-batch; None if they are not called."""
    found: list[Given] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x_TD, index_TK, weight_TK = choice(module, given, named)
        if isinstance(module, nn.ModuleDict):  # Switch says it by a row with a 1, or none where the expert was full
            there_TK, index_TK = index_TK.max(-1, keepdim=True)
            index_TK = index_TK.masked_fill(there_TK == 0, -1)
        found.append((x_TD, index_TK, weight_TK))
        raise Left

    hook = experts.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with suppress(Left):
            work.run(number)
    finally:
        hook.remove()
    if found and not found[0][0].isfinite().all():
        raise overflow(work.replay, work.index)
    return found[0] if found else None
