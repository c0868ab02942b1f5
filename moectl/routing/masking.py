"""Running a model with some of its experts masked: hooks that last as long as a `with`. What for: `masks.py`.

Legend: T rows of a forward pass, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moectl.errors import InputError
from moectl.layerwise.experts import argument_names
from moectl.routing.tap import Tap

_PRODUCTS = (functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_ONE_SUM = 0.01
"""Relative spread of the weights' sums, of bfloat16 say, below which they count as one."""

_OnChoice = Callable[[Tensor, Tensor], Tensor]
"""From the index and the weights [T, K] that experts are given to the weights that they are given instead."""


@dataclass(frozen=True, slots=True)
class Mask:
    """One way to run a model with fewer experts.

    Attributes:
        kind: `kept`, `removed` or `named`.
        r: how many of each token's experts are kept or removed, from 1.
        named: experts by the label of their layer (`Point.label`).
    """

    kind: str
    r: int = 0
    named: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How `parse` reads it."""
        if self.kind != "named":
            return f"{self.kind}:{self.r}"
        return ",".join(f"{layer}:{expert}" for layer, experts in self.named.items() for expert in sorted(experts))


@dataclass(slots=True)
class Usual:
    """What a layer does without a mask: experts per token, and the least and the largest sum of their weights."""

    top_k: int
    least: float
    largest: float

    @property
    def one_sum(self) -> bool:
        """Whether the weights of all tokens have one sum."""
        return self.largest - self.least <= _ONE_SUM * max(abs(self.least), abs(self.largest))


@contextmanager
def watched(taps: Sequence[Tap], usual: dict[str, Usual]) -> Iterator[None]:
    """A model whose layers leave in `usual`, by the names of their points, what they do."""

    def watching(name: str) -> _OnChoice:
        def watch(_: Tensor, weight_TK: Tensor) -> Tensor:
            total_T = weight_TK.double().sum(-1)
            least, largest = float(total_T.min()), float(total_T.max())
            seen = usual.setdefault(name, Usual(weight_TK.shape[-1], least, largest))
            seen.least, seen.largest = min(seen.least, least), max(seen.largest, largest)
            return weight_TK

        return watch

    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(_on_choice(tap, watching(tap.point.name)))
        yield


@contextmanager
def masked(taps: Sequence[Tap], mask: Mask, usual: Mapping[str, Usual]) -> Iterator[None]:
    """A model that runs with a mask, and knows from `usual` where kept weights are scaled to the sum they had."""
    with ExitStack() as stack:
        for tap in taps:
            if mask.kind == "kept":
                stack.enter_context(_on_choice(tap, _keeping(mask.r, usual[tap.point.name].one_sum)))
            elif mask.kind == "removed" or tap.point.label in mask.named:
                last: list[Tensor] = []
                stack.enter_context(_choosing_again(tap, mask, last))
                stack.enter_context(_on_choice(tap, _checking(tap, last)))
        yield


@contextmanager
def _on_choice(tap: Tap, change: _OnChoice) -> Iterator[None]:
    names = None if tap.experts is None else argument_names(type(tap.experts))
    if tap.experts is None or names is None or names[0].endswith("mask"):
        raise _not_ordinary(tap)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(names, args[1:3], strict=False)) | kwargs
        index, weights = (given[name] for name in names)
        if index.shape != weights.shape or index.dtype not in (torch.int32, torch.int64):
            raise _not_ordinary(tap)
        changed = change(index, weights)
        if names[1] in kwargs:
            return args, {**kwargs, names[1]: changed}
        return (*args[:2], changed, *args[3:]), kwargs

    handle = tap.experts.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _keeping(r: int, one_sum: bool) -> _OnChoice:
    def keep(_: Tensor, weight_TK: Tensor) -> Tensor:
        rank_TK = _heaviest(weight_TK).argsort(-1)
        kept_TK = weight_TK.masked_fill(rank_TK >= r, 0)
        if one_sum:
            before_T1, after_T1 = (each.double().sum(-1, keepdim=True) for each in (weight_TK, kept_TK))
            kept_TK = (kept_TK.double() * (before_T1 / after_T1)).to(weight_TK.dtype)
        return kept_TK

    return keep


def _checking(tap: Tap, last: list[Tensor]) -> _OnChoice:
    """Of groups with too few experts left a masked one may be chosen, with no weight; never with one."""

    def check(index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if (last.pop().gather(1, index_TK.long()) & (weight_TK != 0)).any():
            raise InputError(
                f"{tap.point.name}: the router chose an expert that is masked.",
                "Its choice does not follow from its logits alone, so it cannot be made to choose again.",
                "Measure with kept:R, which needs no second choice.",
            )
        return weight_TK

    return check


@contextmanager
def _choosing_again(tap: Tap, mask: Mask, last: list[Tensor]) -> Iterator[None]:
    """Have the router choose among the experts that are not masked; those that are, [T, E], are left in `last`."""
    router = tap.router
    if router is None or tap.point.score_kind == "none":
        raise _not_ordinary(tap)
    forward, had_own = router.forward, "forward" in vars(router)

    def choose_again(*args: Any, **kwargs: Any) -> Any:
        with _Logits(tap.point.num_experts) as usual:
            output = forward(*args, **kwargs)
        if usual.logit_TE is None:
            raise _not_ordinary(tap)
        masked_TE = torch.zeros_like(usual.logit_TE, dtype=torch.bool)
        if mask.kind == "named":
            masked_TE[:, sorted(mask.named[tap.point.label])] = True
        else:
            masked_TE.scatter_(1, _first(output, usual.logit_TE, mask.r), True)
        last.append(masked_TE)
        with _Logits(tap.point.num_experts, masked_TE):
            return forward(*args, **kwargs)

    router.forward = choose_again
    try:
        yield
    finally:
        if had_own:
            router.forward = forward
        else:
            del router.forward


class _Logits(TorchFunctionMode):
    """Sees the first product with a column for every expert, and masks it if told what."""

    def __init__(self, num_experts: int, masked_TE: Tensor | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.masked_TE = masked_TE
        self.logit_TE: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = function(*args, **(kwargs or {}))
        if self.logit_TE is not None or function not in _PRODUCTS or product.shape[-1] != self.num_experts:
            return product
        self.logit_TE = product.reshape(-1, self.num_experts)
        return (
            product if self.masked_TE is None else product.masked_fill(self.masked_TE.view(product.shape), -torch.inf)
        )


def _first(output: Any, logit_TE: Tensor, r: int) -> Tensor:
    """The r experts with the highest logits [T, r], of those that a router chose where its output says."""
    parts = output if isinstance(output, tuple) else (output,)
    index = next((part for part in parts if isinstance(part, Tensor) and not part.is_floating_point()), None)
    if index is None:
        return logit_TE.topk(r).indices
    index_TK = index.reshape(len(logit_TE), -1).long()
    return index_TK.gather(1, _heaviest(logit_TE.gather(1, index_TK))[:, :r])


def _heaviest(value_TK: Tensor) -> Tensor:
    """The order of each token's experts, the largest value first; of equal ones the first."""
    return torch.argsort(value_TK, dim=-1, descending=True, stable=True)


def _not_ordinary(tap: Tap) -> InputError:
    return InputError(
        f"{tap.point.name}: this layer cannot be run with a mask.",
        "Its experts are not called with the numbers and weights of each token's experts that a router chose from "
        "logits of its own.",
        "Leave --mask out; the trace gives an estimate.",
    )
