"""Which parameters of a model a checkpoint stores in another form, and their values straight from the files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.codecs import blob, grid
from moectl.codecs.blob import Blob
from moectl.codecs.grid import GridBlob
from moectl.codecs.matrix import parse
from moectl.errors import InputError
from moectl.integrations.qmoe import dense
from moectl.integrations.qmoe.arrays import tensor_of
from moectl.integrations.qmoe.coded import fits, shape_of
from moectl.text import escape

TYPES = {
    "I32": torch.int32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""What coded and packed tensors are made of."""

Parts = dict[str, TensorRef]
"""The tensors of one parameter, by the ends of their names."""


def coded(model: PreTrainedModel, tensors: Mapping[str, TensorRef]) -> dict[str, Parts]:
    """The coded parameters of a model (docs/format-qmoe.md), by name in memory, in the order of the files."""
    return _parts(model, tensors, {*blob.PARTS, *grid.PARTS}, "")


def packed(model: PreTrainedModel, tensors: Mapping[str, TensorRef]) -> dict[str, Parts]:
    """The parameters in 8 or 4 bits (integrations/qmoe/dense.py), by name in memory, in the order of the files."""
    return _parts(model, tensors, dense.PARTS, ".weight")


def value(checkpoint: Checkpoint, name: str, parts: Parts, shape: torch.Size) -> Tensor:
    """The value of the parameter `name` of this shape, read and decoded: contiguous, in the type of its levels.

    Raises:
        InputError: tensors are damaged, or do not fit together or the shape.
    """
    if set(dense.PARTS) & parts.keys():
        try:
            dense.check(name, {part: on_meta(ref) for part, ref in parts.items()}, shape)
        except InputError as error:
            raise in_file(error, parts) from error
        # copies, because torch warns of memory that cannot be written to
        numbers, scale = (tensor_of(checkpoint.read(parts[part].name).copy()) for part in dense.PARTS)
        return dense.decode(numbers, scale, shape[-1])
    found = matrix(checkpoint, name, parts)
    if not fits(found, shape):
        raise misfit(name, shape_of(found), shape, parts)
    try:
        weights = found.weights()
    except InputError as error:
        raise in_file(error, parts) from error
    return tensor_of(np.ascontiguousarray(weights.swapaxes(-1, -2)) if found.transposed else weights).reshape(shape)


def matrix(checkpoint: Checkpoint, name: str, parts: Parts) -> Blob | GridBlob:
    """What is stored of the coded parameter `name`, read.

    Raises:
        InputError: its tensors do not fit together.
    """
    try:
        return parse(name, {f"{name}.{part}": checkpoint.read(ref.name) for part, ref in parts.items()})
    except InputError as error:
        raise in_file(error, parts) from error


def on_meta(ref: TensorRef) -> Tensor:
    """The shape and type of a stored tensor.

    Raises:
        InputError: neither coded nor packed weights are made of its type.
    """
    if ref.dtype not in TYPES:
        raise InputError(
            f"{escape(str(ref.file))}: {escape(ref.name)} is {ref.dtype}.",
            f"Coded weights are made of {', '.join(TYPES)}.",
            "Fetch the checkpoint again, or compress the model again.",
        )
    return torch.empty(ref.shape, dtype=TYPES[ref.dtype], device="meta")


def misfit(name: str, found: Iterable[int], expected: Iterable[int], parts: Parts) -> InputError:
    """The error about a coded parameter that is another model's."""
    return InputError(
        f"{escape(str(_file(parts)))}: {escape(name)} is {list(found)}, and the model's is {list(expected)}.",
        "These weights are not those of this config.json.",
        "Fetch the checkpoint again, or compress the model again.",
    )


def in_file(error: InputError, parts: Parts) -> InputError:
    """An error about a coded parameter, with the file that it is in."""
    return InputError(f"{escape(str(_file(parts)))}: {error.what}", error.why, error.fix)


def _file(parts: Parts) -> Path:
    return next(iter(parts.values())).file


def _parts(
    model: PreTrainedModel, tensors: Mapping[str, TensorRef], kinds: Collection[str], ending: str
) -> dict[str, Parts]:
    """Parameters with `ending` after their names, of which tensors have these kinds of endings instead.

    A base model is loaded from the weights of one with a head, and the other way round: names differ by its prefix.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Parts] = defaultdict(dict)
    for name, ref in tensors.items():
        owner, _, part = name.rpartition(".")
        if part in kinds:
            places = (f"{each}{ending}" for each in (owner, owner.removeprefix(prefix), prefix + owner))
            place = next((place for place in places if place in parameters), None)
            if place is not None:
                found[place][part] = ref
    return dict(found)
