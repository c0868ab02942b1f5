"""What a checkpoint is, from its config and headers alone: sizes, parameters (total and active), bytes by component."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.families.components import COMPONENTS, component, within
from moectl.families.counting import parameters_of
from moectl.layerwise.active import active_of, shares_of


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model.

    Attributes:
        tensors: that are stored.
        parameters: of the model as it is before it is quantised.
        active_parameters: those that a token passes through, on average; None if that is not known.
        bytes: that are stored.
        bits_per_parameter: 8 times those over the parameters; None where there are none.
    """

    component: str
    tensors: int
    parameters: int
    active_parameters: int | None
    bytes: int
    bits_per_parameter: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `moectl inspect` reports. A tied head is counted once, and what our routers keep besides weights not at all.

    Attributes:
        dtypes: elements that are stored of each type; of a quantised model they are not its parameters.
        experts: in a layer; with PEER single neurons.
        top_k: how many of them work on a token, on average.
    """

    name: str
    path: str
    commit: str | None
    model_type: str
    architecture: str | None
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    experts: int | None
    top_k: float | None
    files: int
    tensors: int
    dtypes: dict[str, int]
    parameters: int
    active_parameters: int | None
    bytes: int
    bits_per_parameter: float | None
    components: tuple[Component, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Measure a checkpoint of any architecture without reading a weight.

    Raises:
        InputError: it names a router of ours that cannot be, or a file is shorter than when it was opened.
    """
    config = checkpoint.config
    shares = shares_of(config, {name: ref.shape for name, ref in checkpoint.tensors.items()})
    sizes = {name: count * shares.is_parameter(name) for name, count in parameters_of(checkpoint).items()}
    groups: dict[str, list[TensorRef]] = {label: [] for label in (*(name for name, _ in COMPONENTS), "other")}
    for name, ref in checkpoint.tensors.items():
        groups[component(name)].append(ref)
    labels = {label: refs for label, refs in groups.items() if refs}
    active = {label: active_of(shares, {ref.name: sizes[ref.name] for ref in refs}) for label, refs in labels.items()}
    components = tuple(_measure(label, refs, sizes, active[label]) for label, refs in labels.items())
    parameters = sum(sizes.values())
    dtypes = Counter[str]()
    for ref in checkpoint.tensors.values():
        dtypes[ref.dtype] += math.prod(ref.shape)
    return Inspection(
        name=checkpoint.name,
        path=str(checkpoint.path),
        commit=checkpoint.commit,
        model_type=checkpoint.model_type,
        architecture=_architecture(config),
        layers=_integer(config, "num_hidden_layers", "num_layers", "n_layer"),
        hidden_size=_integer(config, "hidden_size", "d_model", "n_embd"),
        vocab_size=_integer(config, "vocab_size"),
        experts=shares.experts,
        top_k=_whole(shares.active),
        files=len(checkpoint.stats),
        tensors=len(checkpoint.tensors),
        dtypes=dict(dtypes),
        parameters=parameters,
        active_parameters=_floor(active.values()),
        bytes=checkpoint.nbytes,
        bits_per_parameter=_bits(checkpoint.nbytes, parameters),
        components=components,
    )


def _measure(label: str, refs: list[TensorRef], sizes: dict[str, int], active: Fraction | None) -> Component:
    parameters, stored = sum(sizes[ref.name] for ref in refs), sum(ref.nbytes for ref in refs)
    return Component(label, len(refs), parameters, _floor([active]), stored, _bits(stored, parameters))


def _floor(parts: Iterable[Fraction | None]) -> int | None:
    """The sum in whole numbers; None if a part is not known."""
    known = list(parts)
    return None if None in known else math.floor(sum((part for part in known if part is not None), Fraction(0)))


def _bits(stored: int, parameters: int) -> float | None:
    return 8 * stored / parameters if parameters else None


def _whole(number: float | None) -> float | None:
    return int(number) if number is not None and number == int(number) else number


def _architecture(config: dict[str, Any]) -> str | None:
    names = next((place["architectures"] for place in within(config) if place.get("architectures")), None)
    return str(names[0]) if isinstance(names, list) and names else None


def _integer(config: dict[str, Any], *names: str) -> int | None:
    for place in within(config):
        for name in names:
            if type(place.get(name)) is int:
                return int(place[name])
    return None
