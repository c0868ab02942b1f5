"""The weights of a checkpoint as a model knows them, quantised ones as expressions that dequantise.

A quantised checkpoint stores a weight as several tensors under names of its own: codes, scales, zero points, a shape.
Here they become one name with one shape again, so that nothing else has to know. Three ways of quantising are read:
FP8 with block or tensor scales (DeepSeek, arXiv 2412.19437), compressed-tensors' packed integers, and MXFP4 (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Dequantise, Expression, Shape
from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.spec import Config
from moectl.text import escape, shown

_FIELD = "quantization_config"
_UNQUANTISED = "Give the unquantised checkpoint (bfloat16, float16 or float32)."
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_MXFP4_BLOCK = 32


@dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint, which is the first source of the plan they go into.

    Attributes:
        config: config.json without its quantisation, and with the dtype that was quantised.
        tensors: every weight by its name in the model: a copy, or what dequantises it.
        shapes, dtypes: of each; a dequantised weight has the config's dtype (safetensors' name of it).
        consumed: the stored tensors that quantised weights are made of.
        scheme: how they are quantised, for reports; None where none is.
    """

    config: Config
    tensors: Mapping[str, Expression]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    consumed: frozenset[str] = frozenset()
    scheme: str | None = None


def weights_of(checkpoint: Checkpoint) -> Weights:
    """The weights of a checkpoint by their names in the model. Reads no more than the shapes packed weights state.

    Raises:
        InputError: an unknown way of quantising, or scales and codes that do not belong together.
    """
    stored: dict[str, Expression] = {name: Copy(name) for name in checkpoint.tensors}
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    dtypes = {name: ref.dtype for name, ref in checkpoint.tensors.items()}
    stated = checkpoint.config.get(_FIELD)
    if not stated:
        return Weights(checkpoint.config, stored, shapes, dtypes)
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise _unknown("quant_method", method, f"one of {', '.join(_METHODS)}")
    config = {name: value for name, value in checkpoint.config.items() if name not in (_FIELD, "torch_dtype")}
    config["dtype"] = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
    if not isinstance(config["dtype"], str) or config["dtype"] not in TORCH_NAMES:
        raise _bad(
            f"has dtype = {shown(repr(config['dtype']))}, expected one of {', '.join(TORCH_NAMES)}",
            "It is the type that the weights are dequantised to.",
            "State the type the model was trained in.",
        )
    reader = _Reader(checkpoint)
    scheme = _METHODS[method](reader, stated)
    if not reader.weights:
        raise _bad(
            f"has a {_FIELD} ({method}), but no tensor is quantised that way",
            "The weights are not what the config says.",
            f"Remove {_FIELD} if the weights are plain, or fetch the checkpoint again.",
        )
    kept = [name for name in stored if name not in reader.consumed]
    for name in kept:
        if name in reader.weights:
            raise reader.unfit(name, "absent, since the weight is quantised", "a tensor")
    plain = {name: stored[name] for name in kept}
    dtype = TORCH_NAMES[config["dtype"]]
    return Weights(
        config,
        plain | reader.weights,
        {name: shapes[name] for name in kept} | {name: weight.shape for name, weight in reader.weights.items()},
        {name: dtypes[name] for name in kept} | dict.fromkeys(reader.weights, dtype),
        frozenset(reader.consumed),
        scheme,
    )


@dataclass
class _Reader:
    """Collects quantised weights of a checkpoint and the tensors they use up."""

    checkpoint: Checkpoint
    weights: dict[str, Dequantise] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)

    def ending(self, suffix: str) -> list[TensorRef]:
        """Tensors by the end of their name."""
        return [ref for name, ref in self.checkpoint.tensors.items() if name.endswith(suffix)]

    def take(self, name: str, dtypes: tuple[str, ...], shapes: tuple[Shape, ...] = ()) -> Copy:
        """Use up a tensor of one of the types and one of the shapes (or any).

        Raises:
            InputError: it is missing or something else.
        """
        ref = self.checkpoint.tensors.get(name)
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        expected = f"{'/'.join(dtypes)}{' of shape ' + allowed if allowed else ''}"
        if ref is None:
            raise self.unfit(name, expected, "none")
        if ref.dtype not in dtypes or (shapes and ref.shape not in shapes):
            raise self.unfit(name, expected, f"{ref.dtype} of shape {list(ref.shape)}")
        self.consumed.add(name)
        return Copy(name)

    def matrix(self, name: str, dtypes: tuple[str, ...]) -> Shape:
        """The shape of a matrix of one of the types, which is used up.

        Raises:
            InputError: it is missing or something else.
        """
        self.take(name, dtypes)
        shape = self.checkpoint.tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise self.unfit(name, "a matrix", f"shape {list(shape)}")
        return shape

    def unfit(self, name: str, expected: str, found: str) -> InputError:
        """The error for a tensor that does not fit the others."""
        return InputError(
            f"{escape(str(self.checkpoint.path))}: tensor {escape(name)!r}: expected {expected}, found {found}.",
            f"The quantised weight it belongs to cannot be read as the config's {_FIELD} says.",
            "Check that config.json belongs to these weights, or fetch the checkpoint again.",
        )


def _fp8(reader: _Reader, stated: Config) -> str:
    """`x.weight` float8 [O, I] and `x.weight_scale_inv`, one per block or one in all."""
    block = stated.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise _unknown("weight_block_size", block, "two positive integers, or null for one scale per tensor")
    if stated.get("scale_fmt", "float") not in ("float", "ue8m0", None):
        raise _unknown("scale_fmt", stated["scale_fmt"], "float or ue8m0")
    types = ("F8_E4M3", "F8_E5M2")
    scaled = {ref.name.removesuffix("_scale_inv") for ref in reader.ending("_scale_inv")}
    names = [ref.name for ref in reader.checkpoint.tensors.values() if ref.name in scaled or ref.dtype in types]
    for name in names:
        rows, columns = reader.matrix(name, types)
        tall, wide = block or (rows, columns)
        grid = (_ceil(rows, tall), _ceil(columns, wide))
        shapes = (grid,) if block else ((), (1,), (1, 1))
        scales = reader.take(f"{name}_scale_inv", _SCALE_TYPES, shapes)
        covered = (min(tall, rows), min(wide, columns))
        reader.weights[name] = Dequantise(Copy(name), scales, "float8", (rows, columns), covered)
        inputs = f"{name.removesuffix('weight')}activation_scale"
        if stated.get("activation_scheme") == "static" and inputs in reader.checkpoint.tensors:
            reader.take(inputs, _SCALE_TYPES, ((), (1,), (1, 1)))  # of activations: nothing to do with the weight
    return f"fp8, one scale per {f'{block[0]} x {block[1]} block' if block else 'tensor'}"


def _compressed(reader: _Reader, stated: Config) -> str:
    """`x.weight_packed` int32 [O, I / numbers per int32], `x.weight_scale` [O, G] or [O, 1], `x.weight_shape` [2]."""
    scheme = _packed_scheme(stated)
    bits, size = scheme["num_bits"], scheme["group_size"]
    coding, each = f"int{bits}", 32 // bits
    for ref in reader.ending("_packed"):
        name = ref.name.removesuffix("_packed")
        reader.matrix(ref.name, ("I32",))
        shape = reader.take(f"{name}_shape", ("I64", "I32"), ((2,),)).tensor
        rows, columns = (int(value) for value in reader.checkpoint.read(shape))
        packed = (rows, _ceil(columns, each))
        if rows < 1 or columns < 1 or ref.shape != packed:
            wanted = f"I32 of shape {list(packed)} ({rows} x {columns} by {shape!r}, {bits} bits each)"
            raise reader.unfit(ref.name, wanted, f"I32 of shape {list(ref.shape)}")
        wide = min(size or columns, columns)
        grid = (rows, _ceil(columns, wide))
        scales = reader.take(f"{name}_scale", ("F32", "BF16", "F16"), (grid,))
        zeros, groups = None, None
        if not scheme["symmetric"]:
            zero_name = f"{name}_zero_point"
            found = reader.checkpoint.tensors.get(zero_name)
            if found is not None and found.dtype == "I8":  # before compressed-tensors packed them too
                zeros = reader.take(zero_name, ("I8",), (grid,))
            else:
                zeros = reader.take(zero_name, ("I32",), ((_ceil(rows, each), grid[1]),))
        if f"{name}_g_idx" in reader.checkpoint.tensors:
            groups = reader.take(f"{name}_g_idx", ("I32", "I64"), ((columns,),))
        reader.weights[name] = Dequantise(
            Copy(ref.name), scales, coding, (rows, columns), (1, wide), zeros, groups if size else None
        )
    symmetric = "symmetric" if scheme["symmetric"] else "with zero points"
    return f"int{bits}, {symmetric}, one scale per {f'{size} columns' if size else 'row'}"


def _packed_scheme(stated: Config) -> dict[str, Any]:
    """num_bits, symmetric and group_size (None: one scale per row) of every quantised weight."""
    if stated.get("format") != "pack-quantized":
        raise _unknown("format", stated.get("format"), "pack-quantized")
    for name in ("sparsity_config", "transform_config"):
        inner = stated.get(name)
        if inner and not (isinstance(inner, dict) and inner.get("format") == "dense"):
            raise _unknown(name, inner, "none: the weights would be more than quantised")
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unknown("config_groups", groups, "at least one group")
    schemes = []
    for key, group in groups.items():
        place = f"config_groups.{key}"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _unknown(f"{place}.weights", weights, "the arguments of the quantised weights")
        if group.get("format") not in (None, "pack-quantized"):
            raise _unknown(f"{place}.format", group["format"], "pack-quantized")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else None)
        size = weights.get("group_size") if strategy == "group" else None
        for name, value, known, expected in (
            ("type", weights.get("type", "int"), ("int",), "int"),
            ("num_bits", weights.get("num_bits"), (4, 8), "4 or 8"),
            ("symmetric", weights.get("symmetric", True), (True, False), "true or false"),
            ("strategy", strategy, ("group", "channel"), "group or channel"),
        ):
            if type(value) is not type(known[0]) or value not in known:
                raise _unknown(f"{place}.weights.{name}", value, expected)
        if strategy == "group" and not (type(size) is int and size > 0):
            raise _unknown(f"{place}.weights.group_size", size, "a positive integer")
        schemes.append(
            {"num_bits": weights["num_bits"], "symmetric": weights.get("symmetric", True), "group_size": size}
        )
    if any(scheme != schemes[0] for scheme in schemes):
        raise _unknown("config_groups", schemes, "one scheme for all weights")
    return schemes[0]


def _mxfp4(reader: _Reader, stated: Config) -> str:
    """`x_blocks` uint8 [O, G, 16] and `x_scales` uint8 [O, G] of a matrix x [O, 32 G]."""
    for ref in reader.ending("_blocks"):
        name = ref.name.removesuffix("_blocks")
        values = reader.take(ref.name, ("U8",))
        if len(ref.shape) != 3 or ref.shape[-1] != _MXFP4_BLOCK // 2:
            raise reader.unfit(ref.name, "blocks [O, G, 16] of a matrix", f"shape {list(ref.shape)}")
        rows, groups, _ = ref.shape
        scales = reader.take(f"{name}_scales", ("U8", "F8_E8M0"), ((rows, groups),))
        reader.weights[name] = Dequantise(values, scales, "mxfp4", (rows, groups * _MXFP4_BLOCK), (1, _MXFP4_BLOCK))
    return "mxfp4, one scale per 32 columns"


_METHODS: dict[Any, Callable[[_Reader, Config], str]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def _unknown(name: str, value: Any, expected: str) -> InputError:
    return _bad(
        f"has {_FIELD}.{name} = {shown(repr(value))}, expected {expected}",
        "Weights quantised in another way cannot be read.",
        _UNQUANTISED,
    )


def _bad(what: str, why: str, fix: str) -> InputError:
    return InputError(f"config.json {what}.", why, fix)
