"""The matrices of a layer's experts: which parameters hold them, and how.

Legend: E experts, G of them, R outputs, N inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.layerwise.experts import takes_choice

_EXPERT = re.compile(r"(?<=[._])\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Seen:
    """How the matrices of a parameter lie in it, as a product has shown: R, N, and whether as [N, R]."""

    outputs: int
    inputs: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Stack:
    """The same matrix of every expert of a layer: in one parameter, or in one for each.

    Attributes:
        names: of the parameter, or of those of the experts in their order.
        experts, outputs, inputs: E, R and N.
        transposed: the parameter holds [N, R] matrices.
    """

    names: tuple[str, ...]
    experts: int
    outputs: int
    inputs: int
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether one parameter holds the matrices of all experts."""
        return len(self.names) == 1

    def matrix(self, parameters: Mapping[str, Tensor], expert: int) -> Tensor:
        """That of one expert, [R, N], a view of its parameter."""
        shape = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        parameter = parameters[self.names[0 if self.stacked else expert]]
        found = parameter.view(-1, *shape)[expert if self.stacked else 0]
        return found.mT if self.transposed else found

    def gather(self, parameters: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        """Those of experts start to stop, [G, R, N], a copy in float32."""
        return torch.stack([self.matrix(parameters, expert).float() for expert in range(start, stop)])

    def scatter(self, parameters: Mapping[str, Tensor], start: int, weight_GRN: Tensor) -> None:
        """Put matrices in the place of those of the experts from `start` on."""
        for expert, weight_RN in enumerate(weight_GRN, start):
            self.matrix(parameters, expert).copy_(weight_RN)


def experts_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of a layer that hold routed experts, by name; those inside another are left out."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        kind = type(module).__name__
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and (takes_choice(module) or (kind.endswith("Experts") and "Shared" not in kind)):
            found[name] = module
    return found


def is_direct(modules: Sequence[nn.Module]) -> bool:
    """Whether one module holds all experts, and computes any of them for any rows that it is told.

    NLLB-MoE does not compute the experts that it is told (transformers 5.23), so it can only be watched.
    """
    return len(modules) == 1 and takes_choice(modules[0]) and type(modules[0]).__name__ != "NllbMoeExperts"


def candidates(layer_name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer's experts that can be matrices, by their full names."""
    return {
        f"{layer_name}.{module_name}.{name}".replace("..", "."): parameter
        for module_name, module in experts_modules(layer).items()
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point()
    }


def stacks_of(parameters: Mapping[str, Tensor], seen: Mapping[str, Seen]) -> list[Stack]:
    """The stacks of a layer, in the order of its parameters, from how some of these were multiplied.

    Parameters that differ in an expert's number alone are one stack; it is enough that one of them was seen.
    """
    groups: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        prefix, _, leaf = name.rpartition(".experts.")
        key = name if parameter.ndim > 2 else f"{prefix}.experts.{_EXPERT.sub('*', leaf, count=1)}"
        groups.setdefault(key, []).append(name)
    return list(_stacks(groups.values(), parameters, seen))


def _stacks(
    groups: Iterable[Sequence[str]], parameters: Mapping[str, Tensor], seen: Mapping[str, Seen]
) -> Iterator[Stack]:
    for names in groups:
        how = next((seen[name] for name in names if name in seen), None)
        if how is not None:
            experts = sum(parameters[name].numel() for name in names) // (how.outputs * how.inputs)
            yield Stack(tuple(names), experts, how.outputs, how.inputs, how.transposed)
