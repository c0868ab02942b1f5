"""A module with coded parameters: its own forward, with the weights it needs put where it looks for them.

Nothing of a family is known here. The class of a module is replaced by a subclass of it whose forward decodes, runs the
family's forward, and drops what was decoded. An attribute of an instance wins over a child module of the same name, so
`self.gate_up_proj` is a tensor while the family's forward runs, and a `Coded` before and after.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.ternary import TernaryExperts
from moectl.integrations.layout import up_name
from moectl.integrations.qmoe.coded import Coded

OURS = "moectl"
"""The experts implementation that multiplies with codewords."""

_INDEX = re.compile(r"(index|indices|selected_experts)$")
_HOSTED = "_moectl_hosted"

_ALL_ROWS = ("Llama4TextExperts",)
"""Classes whose experts are all given all rows, one after another, which are zeros where they were not chosen."""

Read = Callable[[Any, int], Tensor | None]
Choose = Callable[[tuple[Any, ...], dict[str, Any], int], Tensor | None]


def replace(model: nn.Module, name: str, coded: Coded) -> None:
    """Put a coded parameter in the place of the one called `name`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    del owner._parameters[leaf]
    owner.add_module(leaf, coded)
    outer = _reader(model, path, leaf)
    host = model.get_submodule(outer)
    if _HOSTED not in vars(host):
        kind: Any = type(host)
        host.__dict__[_HOSTED] = []
        host.__class__ = _hosting(kind)
    host.__dict__[_HOSTED].append(name.removeprefix(outer).removeprefix("."))


def coded_experts(module: Any) -> tuple[TernaryExperts, TernaryExperts] | None:
    """The up- and down-projection of experts that our kernels run as they are stored; None for whatever else."""
    if _HOSTED not in vars(module) or "is_concatenated" not in vars(module):
        return None
    if module.config._experts_implementation != OURS:
        return None
    coded = [module._modules.get(name) for name in (up_name(module), "down_proj")]
    if not all(isinstance(child, Coded) and child.transposed == module.is_transposed for child in coded):
        return None
    up, down = (child.experts() for child in coded)
    return (up, down) if isinstance(up, TernaryExperts) and isinstance(down, TernaryExperts) else None


def restore(model: nn.Module) -> None:
    """Give every module its parameters back, decoded, and the class it had."""
    for host in [module for module in model.modules() if _HOSTED in vars(module)]:
        for name in host.__dict__.pop(_HOSTED):
            path, _, leaf = name.rpartition(".")
            owner = host.get_submodule(path)
            value = getattr(owner, leaf)().contiguous()
            delattr(owner, leaf)
            owner.register_parameter(leaf, nn.Parameter(value))
        host.__class__ = type(host).__bases__[0]


@cache
def _hosting(kind: Any) -> type[nn.Module]:
    run, chosen = kind.forward, _chosen_by(kind)

    @torch.compiler.disable(recursive=False)
    @wraps(run)
    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        places: list[tuple[nn.Module, str]] = []
        if coded_experts(self) is not None:
            return run(self, *given, **named)
        try:
            for name in vars(self)[_HOSTED]:
                path, _, leaf = name.rpartition(".")
                owner = self.get_submodule(path)
                coded: Any = owner._modules[leaf]
                places.append((owner, leaf))
                owner.__dict__[leaf] = coded(chosen(given, named, coded.experts().experts))
            return run(self, *given, **named)
        finally:
            for owner, leaf in places:
                owner.__dict__.pop(leaf, None)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _reader(model: nn.Module, path: str, leaf: str) -> str:
    """The innermost module around a parameter whose class reads it: mostly its owner, for DBRX the one around it."""
    while path:
        kind: Any = type(model.get_submodule(path))
        if _mentions(kind, leaf):
            return path
        path = path.rpartition(".")[0]
    return path


@cache
def _mentions(kind: Any, name: str) -> bool:
    """Whether a method of a class, other than the constructor, has an attribute of this name in it."""
    methods = (
        inspect.unwrap(member) for base in kind.__mro__[:-2] for member in vars(base).values() if callable(member)
    )
    return any(
        isinstance(method, FunctionType) and method.__name__ != "__init__" and name in method.__code__.co_names
        for method in methods
    )


def _chosen_by(kind: type[nn.Module]) -> Choose:
    """Which experts a call of a module needs, as a function of its arguments and their number; None for all of them.

    In transformers nearly every family calls `experts(hidden_states, index, weights)`. Ids from the number of experts
    on are those of experts without weights. JetMoE says how many rows each expert has, sorted by expert.
    """
    names = list(inspect.signature(kind.forward).parameters)[1:4]
    readers = ((place, _read_by(kind, name)) for place, name in enumerate(names))
    place, read = next(((place, read) for place, read in readers if read is not None), (0, None))

    def chosen(given: tuple[Any, ...], named: dict[str, Any], experts: int) -> Tensor | None:
        return None if read is None else read(given[place] if place < len(given) else named.get(names[place]), experts)

    return chosen


def _read_by(kind: type[nn.Module], name: str) -> Read | None:
    """What reads the experts from an argument of this name, if it says them."""
    if _INDEX.search(name):
        return _ids
    if name == "expert_size":
        return _with_rows
    return _not_zero if kind.__name__ in _ALL_ROWS and name == "hidden_states" else None


def _ids(index: Any, _experts: int) -> Tensor | None:
    return index.unique() if isinstance(index, Tensor) and not index.is_floating_point() else None


def _with_rows(sizes: Any, _experts: int) -> Tensor:
    return torch.as_tensor(sizes).nonzero().flatten()


def _not_zero(rows: Tensor, experts: int) -> Tensor:
    """An expert makes zeros of zeros, whatever its weights."""
    return rows.view(experts, -1).any(1).nonzero().flatten()
