"""A coded checkpoint made an ordinary one: a plan whose decoded tensors are made layer by layer while it is written.

In memory there is about a layer at a time (1.3 times its size, of experts whose up- and gate-projection are one tensor
in memory and two on disk). On the disk there is nothing but the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from moectl.checkpoint.card import inherited
from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Made
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.compress.decoding import Decoding
from moectl.errors import UsageError
from moectl.families.components import experts_and_top_k
from moectl.integrations.qmoe.arrays import array_of
from moectl.layerwise.tensors import TORCH_DTYPES
from moectl.text import escape, shown

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def plan_decompress(decoding: Decoding, dtype: str, shard_bytes: int) -> Plan:
    """The plan of the ordinary checkpoint; nothing is decoded for it.

    Args:
        dtype: of floating-point tensors; auto leaves each as it is.

    Raises:
        UsageError: the dtype is not known.
        InputError: the family's experts cannot be exported.
    """
    source = decoding.source
    check_dtype(dtype)
    tensors = tuple(_tensors(decoding, TORCH_NAMES.get(dtype)))
    config = {name: value for name, value in source.config.items() if name != "quantization_config"}
    if dtype != "auto":
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    if decoding.way:
        config["quantization_config"] = decoding.way.config()
    parameters, of_experts = _counts(decoding)
    experts, top_k = experts_and_top_k(source.config)
    recipe = {
        "method": "decompress",
        "dtype": dtype,
        "export": decoding.way and decoding.way.form,
        "quantization": source.config["quantization_config"],
    }
    return Plan(
        sources=(source,),
        tensors=tensors,
        recipe=recipe,
        config=config,
        shard_bytes=shard_bytes,
        files={"README.md": _card(source, decoding.way.form if decoding.way else None)},
        facts={
            "family": source.model_type,
            "source_family": source.model_type,
            "parameters": parameters,
            "active_parameters": parameters - (of_experts * (experts - top_k) // experts if experts and top_k else 0),
            "source_bytes": source.nbytes,
            "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        },
        make=_Layers(decoding),
    )


def check_dtype(dtype: str) -> None:
    """Refuse a `--dtype` that nobody knows.

    Raises:
        UsageError: it is none of auto, bfloat16, float16 and float32.
    """
    if dtype != "auto" and (dtype not in TORCH_NAMES or dtype == "float64"):
        raise UsageError(f"--dtype {shown(dtype)!r} is not known.", "", "Give auto, bfloat16, float16 or float32.")


class _Layers:
    """Decodes what is asked for layer by layer; of a layer that two shards share, the second need not wait."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._layer = ""
        self._tensors: Mapping[str, np.ndarray] = {}

    def __call__(self, layer: str) -> Mapping[str, np.ndarray]:
        if layer != self._layer:
            self._layer, self._tensors = "", {}  # before the next one takes as much memory
            self._tensors = {
                name: array_of(tensor.contiguous()) for name, tensor in self._decoding.decode(layer).items()
            }
            self._layer = layer
        return self._tensors


def _tensors(decoding: Decoding, dtype: str | None) -> Iterator[OutputTensor]:
    """In the source's order; a layer's decoded tensors come where the first of its coded ones was."""
    source = decoding.source
    layer_of = {
        stored: layer for layer, names in decoding.layers.items() for name in names for stored in decoding.origin(name)
    }
    written: set[str] = set()
    for name, ref in source.tensors.items():
        if name not in layer_of:
            yield planned(name, Copy(name), (source,), dtype if dtype and ref.dtype in FLOATS else ref.dtype)
        elif (layer := layer_of[name]) not in written:
            written.add(layer)
            for each, tensor in decoding.describe(layer).items():
                kept = _NAMES[tensor.dtype]
                made = Made(each, layer, kept, tuple(tensor.shape))
                yield planned(each, made, (source,), dtype if dtype and kept in FLOATS else kept)


def _counts(decoding: Decoding) -> tuple[int, int]:
    """Parameters in all, and those of experts."""
    sizes = {name: decoding.model.get_parameter(name).numel() for name in decoding.coded}
    used = {stored for name in sizes for stored in decoding.origin(name)}
    plain = sum(math.prod(ref.shape) for name, ref in decoding.source.tensors.items() if name not in used)
    of_experts = sum(size for name, size in sizes.items() if "about" in decoding.coded[name])
    return plain + sum(sizes.values()), of_experts


def _card(source: Checkpoint, form: str | None) -> str:
    name = escape(source.name)
    lines = [
        "---",
        *("library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, moectl]", *inherited(source)),
        "---",
        "",
        f"# {name}, {f'as {form}' if form else 'decompressed'}",
        "",
        f"It computes what `{name}` does: what compressing that has cost is not undone.",
    ]
    if form:
        lines += ["", "Its experts are packed by compressed-tensors, which transformers needs to load it; vLLM has it."]
    return "\n".join(lines) + "\n"
