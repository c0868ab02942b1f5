"""Reading who goes where while a model runs: hooks that last as long as a `with`, and an account of what they saw.

    with Capture(model) as capture:
        model(input_ids)
        for tap, seen in zip(capture.taps, capture.take()): ...

Nothing is copied from the device and nothing is waited for; the tensors are those that the model made. A model that is
to be compiled must be compiled inside, after the hooks are there.

Legend: T rows of a forward pass (tokens, padding too), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from moectl.errors import InputError
from moectl.layerwise.experts import argument_names
from moectl.routing.points import find
from moectl.routing.tap import Choice, Tap
from moectl.text import escape


@dataclass(frozen=True, slots=True)
class Seen:
    """What happened at one tap in one forward pass, as the model had it: on its device, in its type.

    Attributes:
        index_TK: the experts, NO_EXPERT where a row was sent nowhere.
        weight_TK: what their outputs were multiplied with.
        score_TE: the router's scores; None if not asked for, or if there are none.
    """

    index_TK: Tensor
    weight_TK: Tensor
    score_TE: Tensor | None = None


class Capture:
    """Hooks on the taps of a model, from `with` to its end.

    Attributes:
        taps: where the model is watched.
        scores: whether the routers' scores are kept too.
    """

    def __init__(self, model: nn.Module, *, scores: bool = True, taps: Sequence[Tap] | None = None) -> None:
        self.taps = tuple(find(model) if taps is None else taps)
        self.scores = scores
        self._model = model
        # Lists that are emptied in place: compiled code holds on to these very objects.
        self._choices: list[list[Choice]] = [[] for _ in self.taps]
        self._scores: list[list[Tensor]] = [[] for _ in self.taps]
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        """Install the hooks.

        Raises:
            InputError: the model is in training mode with gradient checkpointing, which runs every layer twice.
        """
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules())
        if self._model.training and checkpointed:
            raise InputError(
                "Gradient checkpointing is on, and the model is in training mode.",
                "Every layer runs once more in the backward pass, and all of its tokens would be counted twice.",
                "Call model.eval() or model.gradient_checkpointing_disable() first.",
            )
        for number, tap in enumerate(self.taps):
            if tap.experts is not None:
                hook = self._on_experts(number, tap, tap.experts)
                self._handles.append(tap.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            if tap.router is not None and (tap.experts is None or (self.scores and tap.scores is not None)):
                self._handles.append(tap.router.register_forward_hook(self._on_router(number, tap)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    def take(self) -> tuple[Seen, ...]:
        """What the one forward pass since the last call showed, in the order of the taps.

        Raises:
            InputError: a tap was not called, or more than once, or was given other rows than its neighbours.
        """
        try:
            seen = tuple(self._seen(number, tap) for number, tap in enumerate(self.taps))
            self._check_rows(seen)
            return seen
        finally:
            self._clear()

    def _seen(self, number: int, tap: Tap) -> Seen:
        name, choices, scores = escape(tap.point.name), self._choices[number], self._scores[number]
        if not choices:
            raise InputError(
                f"{name} was not seen to run.",
                "Its counts would be zero and mean nothing. The model was compiled before the hooks were there, or a "
                "kernel or a quantised layer replaced its modules.",
                "Load the model without torch.compile, use_kernels and MXFP4 (dequantize=True), or give an adapter.",
            )
        calls = max(len(choices), len(scores))
        if calls > 1:
            raise InputError(
                f"{name} ran {calls} times in one forward pass.",
                "Tokens would be counted more than once: gradient checkpointing runs layers again, some models share "
                "one layer between several places, and several forward passes must be taken one by one.",
                "Turn gradient checkpointing off, and take what was seen after every forward pass.",
            )
        index_TK, weight_TK = (part.detach().flatten(0, -2) for part in choices[0])
        return Seen(index_TK, weight_TK, scores[0] if scores else None)

    def _check_rows(self, seen: Sequence[Seen]) -> None:
        """Every tap of the encoder is given the same rows, and every other one the same."""
        first: dict[bool, int] = {}
        for number, tap in enumerate(self.taps):
            other = first.setdefault(tap.point.role == "encoder", number)
            rows, others = len(seen[number].index_TK), len(seen[other].index_TK)
            if rows != others:
                name, known = escape(tap.point.name), escape(self.taps[other].point.name)
                raise InputError(
                    f"{name} was given {rows} rows, and {known} {others}.",
                    "One of them is not called with all tokens, so which row is which token is not known.",
                    "Give an adapter (an entry point of the group `moectl.routing_adapters`) that puts rows in place.",
                )

    def _on_experts(self, number: int, tap: Tap, experts: nn.Module) -> Any:
        index_name, weights_name = argument_names(type(experts)) or ("", "")
        found = self._choices[number]

        def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            index = named[index_name] if index_name in named else given[1]
            weights = named[weights_name] if weights_name in named else given[2]
            found.append(tap.chosen(index, weights))

        return hook

    def _on_router(self, number: int, tap: Tap) -> Any:
        choices, scores = self._choices[number], self._scores[number]

        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            if tap.experts is None:
                choices.append(tap.chosen(output))
            found = tap.scores(output) if self.scores and tap.scores is not None else None
            if found is not None:
                scores.append(found.detach().flatten(0, -2))

        return hook

    def _clear(self) -> None:
        for choices, scores in zip(self._choices, self._scores, strict=True):
            choices.clear()
            scores.clear()
