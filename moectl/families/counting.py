"""How many of a model's parameters each stored tensor stands for.

A quantised weight is several tensors: one that holds its numbers, several of them in an element, and others that say
how to read it. By what names, ends of names and sizes say; of packed weights their stated shapes are read, no more.
Known are our own codes (docs/format-qmoe.md), compressed-tensors, FP8, MXFP4, NVFP4, GPTQ, AWQ and bitsandbytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.families.components import within

_BESIDE = re.compile(
    r"(_scale|_scale_inv|_scale_2|_global_scale|_zero_point|_g_idx|_shape|_scales"
    r"|\.SCB|\.weight_format|\.absmax|\.quant_map|\.nested_\w+|\.quant_state\.\w+)$"
)
"""Ends of names of what says how a weight is to be read, after the name of that weight."""

_INPUTS = re.compile(r"\.(input|activation)_(scale|global_scale|zero_point)$")
"""The same of what goes into a layer."""

_GPTQ = {"qweight", "qzeros", "scales", "g_idx"}
_CODED = {"about", "codes", "counts", "levels", "packed", "scales", "zeros"}
_ROWS = {"codes": "counts", "packed": "scales"}
"""Of our codes: the tensor that has the rows of what is coded."""

_NO_NUMBERS = ("BOOL", "I16", "I32", "I64", "U16", "U32", "U64")
"""Types of tables and counters. Those of a byte are weights in some models."""


def parameters_of(checkpoint: Checkpoint) -> dict[str, int]:
    """By the name of every stored tensor; 0 for tables and counters, and for what says how others are to be read.

    Raises:
        InputError: a file is shorter than when it was opened.
    """
    stated = next((found for place in within(checkpoint.config) if (found := place.get("quantization_config"))), None)
    count = _counter(checkpoint, stated) if isinstance(stated, dict) else _plain
    return {name: count(ref) for name, ref in checkpoint.tensors.items()}


def _plain(ref: TensorRef) -> int:
    return 0 if ref.dtype in _NO_NUMBERS else math.prod(ref.shape)


def _counter(checkpoint: Checkpoint, stated: dict[str, object]) -> Callable[[TensorRef], int]:
    tensors = checkpoint.tensors
    bits = next((bits for name in ("bits", "w_bit") if type(bits := stated.get(name)) is int and 0 < bits <= 32), 4)

    def shape_in(name: str) -> list[int]:
        """The sizes that a small tensor of whole numbers states."""
        ref = tensors.get(name)
        if ref is None or ref.dtype not in ("I32", "I64") or ref.nbytes > 64:
            return []
        return [max(0, int(value)) for value in checkpoint.read(name).ravel()]

    def count(ref: TensorRef) -> int:
        owner, _, part = ref.name.rpartition(".")
        elements = math.prod(ref.shape)
        about = shape_in(f"{owner}.about") if part in _CODED else []
        if len(about) in (4, 5):
            rows = tensors.get(f"{owner}.{_ROWS[part]}") if part in _ROWS else None
            if rows is None:
                return 0
            return math.prod(rows.shape if part == "codes" else rows.shape[:-1]) * about[2]
        if part in _GPTQ and f"{owner}.qweight" in tensors:
            return elements * 32 // bits if part == "qweight" else 0
        for end, each in (("_packed", 32 // bits if ref.dtype == "I32" else 2), ("_blocks", 2)):
            if ref.name.endswith(end):
                sizes = shape_in(f"{ref.name.removesuffix(end)}_shape")
                return math.prod(sizes) if sizes else elements * each
        weight = _BESIDE.sub("", ref.name)
        if weight != ref.name and any(f"{weight}{end}" in tensors for end in ("", ".weight", "_packed", "_blocks")):
            return 0
        if _INPUTS.search(ref.name) and any(f"{owner}.weight{end}" in tensors for end in ("", "_packed")):
            return 0
        if ref.dtype == "U8" and any(f"{ref.name}{end}" in tensors for end in (".quant_map", "_scale_2")):
            return 2 * elements
        return _plain(ref)

    return count
