"""A tap: where the choices and the scores of one MoE layer can be read while a model runs.

In transformers nearly every family calls `experts(hidden_states, index, weights)` with what its router decided, after
biases, groups, tables and capacity. So choices are read from the arguments of that call, found by their names, and
scores from the output of the router that stands beside the experts. Families that do otherwise have an adapter.

Legend: T tokens (rows of the call), E experts, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moectl.integrations.routed.held import Held
from moectl.traces.trace import NO_EXPERT, Point

BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""What families call the numbers that are added to scores for choosing alone."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|h)\.(\d+)(?=\.)")
_ROUTERS = ("router", "gate")
_COUNTS = ("total_experts", "num_experts", "num_local_experts")

Choice = tuple[Tensor, Tensor]
"""Experts [T, K], NO_EXPERT where a token is sent nowhere, and what their outputs are multiplied with [T, K]."""


@dataclass(frozen=True, slots=True)
class Tap:
    """One dispatch point of a model.

    Attributes:
        point: what is known of it; `top_k` is 0 until a forward pass has shown it.
        experts: the module that is given the choice; None if `chosen` reads it from the output of `router`.
        router: the module that computes the scores.
        chosen: the choice, from the index and the weights that the experts are given, or from the router's output.
        scores: the scores [T, E] from the router's output, None if it holds none; None if none mean anything.
        ordered: the experts come in the order of the router's preference; else they are sorted by weight. Routers
            that call top-k with `sorted=False`, and tables, give them in any order.
        warning: what a reader of the numbers has to know of this family; empty for nothing.
    """

    point: Point
    experts: nn.Module | None
    router: nn.Module | None
    chosen: Callable[..., Choice]
    scores: Callable[[Any], Tensor | None] | None
    ordered: bool = False
    warning: str = ""


def dispatch_tap(model: nn.Module, name: str) -> Tap:
    """The tap of an experts module that is called in the ordinary way, with the router that stands beside it."""
    experts = model.get_submodule(name)
    block, router = beside(model, name)
    count = next((int(getattr(experts, each)) for each in _COUNTS if hasattr(experts, each)), 0)
    kind = "none" if router is None else "logits"
    point = new_point(name, count, score_kind=kind, selects=router is not None and _is_plain(block, router))
    scores = None if router is None else first_scores(count)
    return Tap(point, experts, router, _of_weight if isinstance(router, Held) else lambda *choice: choice, scores)


def _of_weight(index: Tensor, weights: Tensor) -> Choice:
    """The choice of one of our routers, which sends a token without an expert to the first with a weight of 0."""
    return index.masked_fill(weights == 0, NO_EXPERT), weights


def new_point(name: str, num_experts: int, **facts: Any) -> Point:
    """The point of a module: its layer's number and its role are in its name."""
    found = _LAYER.search(name)
    parts = name.split(".")
    role = "encoder" if "encoder" in parts else "mtp" if "mtp" in parts else "decoder"
    return Point(name, int(found[1]) if found else 0, num_experts, 0, **{"role": role, **facts})


def beside(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module | None]:
    """The block an experts module stands in, past what PEFT wraps around it, and the router in that block."""
    path = re.sub(r"(\.base_layer)+$", "", name).rpartition(".")[0]
    block = model.get_submodule(path)
    routers = (getattr(block, each, None) for each in _ROUTERS)
    return block, next((router for router in routers if isinstance(router, nn.Module)), None)


def first_scores(num_experts: int) -> Callable[[Any], Tensor | None]:
    """From a router's output to its first floating-point tensor with a number for every expert, if it has one.

    Under expert parallelism a module knows only its own experts, and its router all: hence at least so many.
    """

    def read(output: Any) -> Tensor | None:
        parts = output if isinstance(output, tuple) else (output,)
        floating = (part for part in parts if isinstance(part, Tensor) and part.is_floating_point())
        return next((part for part in floating if part.shape[-1] >= num_experts), None)

    return read


def _is_plain(block: nn.Module, router: nn.Module) -> bool:
    """Whether nothing stands between a router's scores and its top-k: no bias, no groups, no rule of ours."""
    named = [*block.named_buffers(), *block.named_parameters()]
    if isinstance(router, Held) or any(key.rpartition(".")[2] in BIASES for key, _ in named):
        return False
    groups = getattr(router, "num_group", None) or 1
    return (getattr(router, "topk_group", None) or groups) >= groups or getattr(router, "topk_method", "") == "greedy"
