"""What a checkpoint is, from its config and headers alone: sizes, parameters (total and active), bytes by component."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.families.components import COMPONENTS, component, experts_and_top_k, within


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model. `active_parameters` are those a token passes through; None if top-k is unknown."""

    component: str
    tensors: int
    parameters: int
    active_parameters: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `moectl inspect` reports. Parameters are elements of stored tensors: a tied head is counted once."""

    name: str
    path: str
    commit: str | None
    model_type: str
    architecture: str | None
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    experts: int | None
    top_k: int | None
    files: int
    tensors: int
    dtypes: dict[str, int]
    parameters: int
    active_parameters: int | None
    bytes: int
    components: tuple[Component, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Measure a checkpoint of any architecture without reading a weight."""
    config = checkpoint.config
    experts, top_k = experts_and_top_k(config)
    groups: dict[str, list[TensorRef]] = {label: [] for label in (*(name for name, _ in COMPONENTS), "other")}
    for name, ref in checkpoint.tensors.items():
        groups[component(name)].append(ref)
    components = tuple(_measure(label, refs, experts, top_k) for label, refs in groups.items() if refs)
    active = [part.active_parameters for part in components]
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
        experts=experts,
        top_k=top_k,
        files=len(checkpoint.stats),
        tensors=len(checkpoint.tensors),
        dtypes=dict(dtypes),
        parameters=sum(part.parameters for part in components),
        active_parameters=None if None in active else sum(count or 0 for count in active),
        bytes=checkpoint.nbytes,
        components=components,
    )


def _measure(label: str, refs: list[TensorRef], experts: int | None, top_k: int | None) -> Component:
    parameters = sum(math.prod(ref.shape) for ref in refs)
    active: int | None = parameters
    if label == "experts":
        active = parameters * top_k // experts if experts and top_k and top_k <= experts else None
    return Component(label, len(refs), parameters, active, sum(ref.nbytes for ref in refs))


def _architecture(config: dict[str, Any]) -> str | None:
    names = next((place["architectures"] for place in within(config) if place.get("architectures")), None)
    return str(names[0]) if isinstance(names, list) and names else None


def _integer(config: dict[str, Any], *names: str) -> int | None:
    for place in within(config):
        for name in names:
            if type(place.get(name)) is int:
                return int(place[name])
    return None
