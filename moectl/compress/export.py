"""Coded experts as compressed-tensors' "pack-quantized", the format that vLLM and transformers read.

    NAME.weight_packed   int32 [R, words]    numbers of `bits` bits, half their range stands for zero; bit i of a row
                                             is bit i % 32 of its word i // 32
    NAME.weight_scale    bf16|f16|f32 [R, G] of each group, or one for the row
    NAME.weight_shape    int64 [2]           R, N

NAME is a matrix of one expert, called as the family's own checkpoints call it. What is decoded from it is bit for bit
what our own format decodes to: numbers and scales are moved, never computed again.

Legend: R rows (outputs), N columns, G groups in a row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import ceil, gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moectl.codecs import blob, grid
from moectl.codecs.bits import packed
from moectl.compress.qmoe_recipe import EXPORTS as FORMATS
from moectl.errors import InputError, UsageError
from moectl.integrations.qmoe.arrays import tensor_of
from moectl.layerwise.quiet import quiet
from moectl.text import escape, shown

GROUP_SIZES = (128, 64, 32)
"""What vLLM's kernels take besides whole rows."""

_EXPERT = re.compile(r".*\.experts\.\d+\.[^.]+")
_WHOLE = ((blob.ABOUT_NUMBERS,), (grid.ABOUT_NUMBERS,))  # another is damaged, and refused when its matrix is read


@dataclass(frozen=True)
class Packing:
    """The one way in which all experts of an export are packed.

    Attributes:
        form: a name of `FORMATS`.
        group: weights that share a scale; None for whole rows.
    """

    form: str
    group: int | None

    @property
    def bits(self) -> int:
        """Of a weight."""
        return FORMATS[self.form]

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of an export: experts are packed, and all else is told to be left alone."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"format": "pack-quantized"}},
            "ignore": ["lm_head", r"re:^(?!.*\.experts(\.|$)).*"],
            "kv_cache_scheme": None,
        }


def packing(form: str, abouts: Iterable[np.ndarray]) -> Packing:
    """How to pack matrices so that all have one scheme, which vLLM requires, and none loses anything.

    A row with one scale may as well have several that are equal.

    Args:
        form: a name of `FORMATS`.
        abouts: the tensor NAME.about of every coded parameter.

    Raises:
        UsageError: there is no such format.
        InputError: their groups have no size in common that kernels take.
    """
    return _packing(form, {_layout(about) for about in abouts if about.shape in _WHOLE})


def foreseen(form: str, model: PreTrainedModel, names: Iterable[str], group_size: int) -> Packing:
    """The same before anything is quantised, to have what cannot be exported refused in time.

    Args:
        form: a name of `FORMATS`.
        model: of the family, possibly on meta.
        names: of the parameters that will be quantised.
        group_size: weights that will share a scale, -1 for a row.

    Raises:
        UsageError: there is no such format.
        InputError: as above, or the family has no names for matrices of single experts.
    """
    widths = {name: model.get_parameter(name).shape[-1] for name in names}
    rows = {(width, width if group_size == -1 else min(group_size, width)) for width in widths.values()}
    way = _packing(form, rows)
    for name in widths:
        imagined_tensors(model, name, torch.float32, way)
    return way


def export_tensors(model: PreTrainedModel, matrix: blob.Blob | grid.GridBlob, way: Packing) -> dict[str, Tensor]:
    """One coded parameter as the tensors that stand for it on disk, by their names there.

    Args:
        model: of the family, possibly on meta; its rules for names and layouts on disk are used.
        matrix: what is coded, under its name in memory.
        way: as `packing` found it for the whole model.

    Raises:
        InputError: it has other levels or more bits than the format, or the family has no names for matrices of
            single experts.
    """
    if matrix.transposed:
        raise _nameless(model, matrix.name)
    width = matrix.width
    group = min(matrix.group, width) if isinstance(matrix, grid.GridBlob) else width
    row_bytes, scales = _numbers(matrix, way.bits)
    repeated = scales[..., np.arange(0, width, way.group or width) // group]
    words, steps = (tensor_of(np.ascontiguousarray(array)) for array in (_words(row_bytes), repeated))
    return _apart(model, matrix.name, words, steps, width)


def imagined_tensors(model: PreTrainedModel, name: str, dtype: torch.dtype, way: Packing) -> dict[str, Tensor]:
    """The same on meta, of a parameter whose scales or levels have a dtype.

    Raises:
        InputError: the family has no names for matrices of single experts.
    """
    *front, width = model.get_parameter(name).shape
    words, groups = ceil(width * way.bits / 32), width // (way.group or width)
    packed = torch.empty((*front, words), dtype=torch.int32, device="meta")
    return _apart(model, name, packed, torch.empty((*front, groups), dtype=dtype, device="meta"), width)


def _apart(model: PreTrainedModel, name: str, packed: Tensor, scale: Tensor, width: int) -> dict[str, Tensor]:
    """What lies row by row beside a parameter, taken apart as the parameter is on disk."""
    tensors: dict[str, Tensor] = {}
    for part, stack in (("weight_packed", packed), ("weight_scale", scale)):
        with quiet():
            matrices = revert_weight_conversion(model, {name: stack})
        for each, matrix in matrices.items():
            expert = each.removesuffix(".weight")
            if not _EXPERT.fullmatch(expert):
                raise _nameless(model, each)
            rows = matrix.reshape(-1, stack.shape[-1])  # transformers 5.17 drops dimensions of 1
            tensors[f"{expert}.{part}"] = rows.contiguous()
            tensors[f"{expert}.weight_shape"] = torch.tensor([len(rows), width])
    return tensors


def _numbers(matrix: blob.Blob | grid.GridBlob, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of bytes with numbers of so many bits, half their range for zero, and the scales [..., R, S]."""
    half = 1 << bits - 1
    if isinstance(matrix, blob.Blob):
        trits = matrix.trits()
        minus, plus = matrix.levels[..., 0], matrix.levels[..., 1]
        has_minus, has_plus = trits.min(-1, initial=0) < 0, trits.max(-1, initial=0) > 0
        if (has_minus & has_plus & (minus != -plus)).any():
            raise _asymmetric(matrix.name, "--symmetric")
        trits += half  # in place: a layer of a large model has billions of them
        scales = np.where(has_plus, plus, np.where(has_minus, -minus, np.ones_like(minus)))
        return packed(trits.view(np.uint8), bits), scales[..., None]
    if matrix.bits > bits:
        raise InputError(
            f"{escape(matrix.name)} has {matrix.bits} bits, and the format {bits}.",
            "An export moves numbers; it does not quantise again.",
            "Export to w4a16, or compress the model with --bits 2.",
        )
    own_half = 1 << matrix.bits - 1
    if (matrix.points() != own_half).any():
        raise _asymmetric(matrix.name, f"--bits {matrix.bits} --symmetric")
    if matrix.bits == bits:
        return matrix.packed, matrix.scales
    return packed(matrix.numbers() + np.uint8(half - own_half), bits), matrix.scales


def _words(row_bytes: np.ndarray) -> np.ndarray:
    """Rows of bytes as rows of little-endian words, the last one filled up with zeros."""
    missing = -row_bytes.shape[-1] % 4
    return np.pad(row_bytes, [(0, 0)] * (row_bytes.ndim - 1) + [(0, missing)]).view("<i4")


def _packing(form: str, layouts: Collection[tuple[int, int]]) -> Packing:
    """Of rows of so many weights, so many of which share a scale."""
    if form not in FORMATS:
        raise UsageError(f"--export {shown(form)!r} is not known.", "", f"Give {' or '.join(FORMATS)}.")
    if all(group == width for width, group in layouts):
        return Packing(form, None)
    common = gcd(*(number for layout in layouts for number in layout))
    group = next((size for size in GROUP_SIZES if common % size == 0), None)
    if group is None:
        listed = ", ".join(f"{width} by {size}" for width, size in sorted(layouts))
        raise InputError(
            f"The rows of its experts ({listed}) cannot all be cut into groups of {GROUP_SIZES[-1]} or more.",
            f"--export {form} gives all experts one scheme; kernels take groups of 128, 64 or 32, or whole rows.",
            "Compress the model with a --group-size that divides the widths of its experts, or with -1.",
        )
    return Packing(form, group)


def _layout(about: np.ndarray) -> tuple[int, int]:
    """Weights in a row, and of them those that share a scale."""
    numbers = about.tolist()
    width, group = numbers[2], numbers[3] if len(numbers) == grid.ABOUT_NUMBERS else numbers[2]
    return width, min(width, group)


def _nameless(model: PreTrainedModel, name: str) -> InputError:
    return InputError(
        f"Checkpoints of {escape(model.config.model_type)} have no names for single experts that loaders of the format "
        f"know, only {escape(name)}.",
        "The format packs the matrices of single experts, and nothing would read them under made-up names.",
        "Keep the compressed model as it is, or make a plain one with `moectl decompress`.",
    )


def _asymmetric(name: str, options: str) -> InputError:
    return InputError(
        f"{escape(name)} has other levels below zero than above.",
        "What vLLM reads has one scale for both sides.",
        f"Compress the model it was made from with {options}.",
    )
