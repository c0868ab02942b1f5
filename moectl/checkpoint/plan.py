"""A plan: every byte of a new checkpoint, decided before any is written.

Upcycling, pruning and merging only build plans; the writer only carries them out. A plan prints, serialises,
knows its exact size and has a fingerprint, so an interrupted run knows what it was doing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moectl.checkpoint.dtypes import FLOATS, ITEM_BYTES
from moectl.checkpoint.expressions import Expression, Shape, extents, from_json, numbers_read, shape_of, to_json
from moectl.checkpoint.source import INDEX, SINGLE, Checkpoint
from moectl.errors import InputError

if TYPE_CHECKING:
    import numpy as np

PROVENANCE = "moectl.json"
CONFIG = "config.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
Make = Callable[[str], Mapping[str, "np.ndarray"]]
"""From the group of a `Made` to all tensors of that group, which follow from the sources and the recipe alone."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to write."""

    name: str
    dtype: str
    shape: Shape
    expression: Expression

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file to write: its header (with the length prefix) and its tensors in order."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        sources: the checkpoints that expressions refer to by place; side files come from the first.
        tensors: in the order they will lie on disk.
        recipe: what was asked for, normalised: together with the sources it determines everything.
        config: the config.json to write.
        files: other generated text files by name, such as the model card.
        facts: what the builder wants to report (parameters total and active, ...).
        weights_file, config_file: for readers that look for other names than a model's, such as PEFT's.
        make: what is `Made`, where anything is; asked group by group, in the order of the tensors.
    """

    sources: tuple[Checkpoint, ...]
    tensors: tuple[OutputTensor, ...]
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    seed: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights_file: str = SINGLE
    config_file: str = CONFIG
    make: Make | None = None

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files, filled in order up to `shard_bytes` (a larger tensor gets its own)."""
        groups: list[list[OutputTensor]] = [[]]
        filled = 0
        for tensor in self.tensors:
            if groups[-1] and filled + tensor.nbytes > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(tensor)
            filled += tensor.nbytes
        if len(groups) == 1:
            return (Shard(self.weights_file, _header(groups[0]), tuple(groups[0])),)
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        return tuple(Shard(name, _header(group), tuple(group)) for name, group in zip(names, groups, strict=True))

    @cached_property
    def text_files(self) -> dict[str, str]:
        """Every generated text file but the provenance: config, index if there are several shards, card."""
        files = {self.config_file: json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n"}
        if len(self.shards) > 1:
            metadata = {"total_parameters": self.parameters, "total_size": self.nbytes}
            weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
            files[INDEX] = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
        return files | dict(self.files)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the output's bytes, but the weights themselves."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def is_copied(self, tensor: OutputTensor) -> bool:
        """Whether the tensor is bytes of the sources, moved as they are."""
        return extents(tensor.expression, self.sources, tensor.dtype) is not None

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; sources by what identifies them."""
        return {
            "moectl": version("moectl"),
            "recipe": dict(self.recipe),
            "sources": [source_identity(source) for source in self.sources],
            "config": dict(self.config),
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
            "files": dict(self.files),
            "weights_file": self.weights_file,
            "config_file": self.config_file,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "expression": to_json(tensor.expression),
                }
                for tensor in self.tensors
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], sources: Sequence[Checkpoint]) -> Plan:
        """The inverse of `to_json`, over the same sources opened again.

        Raises:
            InputError: the sources are not the ones the plan was made for, or moectl has another version.
        """
        identities = [source_identity(source) for source in sources]
        if data["sources"] != identities or data["moectl"] != version("moectl"):
            raise InputError(
                "The plan was made for other sources, or by another version of moectl.",
                f"It names {data['sources']} and moectl {data['moectl']}.",
                "Make the plan again from these sources.",
            )
        return Plan(
            sources=tuple(sources),
            tensors=tuple(
                OutputTensor(t["name"], t["dtype"], tuple(t["shape"]), from_json(t["expression"]))
                for t in data["tensors"]
            ),
            recipe=data["recipe"],
            config=data["config"],
            seed=data["seed"],
            shard_bytes=data["shard_bytes"],
            files=data["files"],
            weights_file=data["weights_file"],
            config_file=data["config_file"],
        )


def planned(name: str, expression: Expression, sources: Sequence[Checkpoint], dtype: str | None = None) -> OutputTensor:
    """An output tensor of the expression's shape, in `dtype` or else the type of the tensors it reads.

    Raises:
        InputError: it would have to compute with a type that is not floating point.
    """
    refs = [sources[leaf.source].tensors[leaf.tensor] for leaf in numbers_read(expression)]
    if dtype is None:
        dtype = refs[0].dtype
    if extents(expression, sources, dtype) is None:
        for ref in refs:
            if ref.dtype not in FLOATS:
                raise InputError(
                    f"{ref.file}: tensor {ref.name!r} is {ref.dtype}, expected one of {', '.join(FLOATS)}.",
                    f"Output tensor {name!r} has to be computed from it.",
                    "Give a checkpoint in bfloat16, float16 or float32.",
                )
    return OutputTensor(name, dtype, shape_of(expression, sources), expression)


def source_identity(source: Checkpoint) -> dict[str, Any]:
    """What tells one source from another without reading its weights: name, commit, hashes of config and layout."""
    layout = [[ref.name, ref.dtype, ref.shape, ref.file.name, ref.offset] for ref in source.tensors.values()]
    return {
        "name": source.name,
        "commit": source.commit,
        "config_sha256": _sha256_json(source.config),
        "layout_sha256": _sha256_json(layout),
    }


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
