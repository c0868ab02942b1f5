"""What one output tensor is made of: a small tree over source tensors, plain data from end to end.

    expression := Copy | Index | Slice | Concat | Stack | Mean | RowMean | Scale | AddLowRank
                | Noise | Shuffle | Redraw | Init | Uniform | Literal
                | Dequantise

An expression knows its shape before any weight is read, serialises to JSON, and is either a list of byte
ranges of source files (`extents`: moved by the kernel, never through Python) or computed (`evaluate.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from moectl.checkpoint.dtypes import ITEM_BYTES
from moectl.checkpoint.source import Checkpoint

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A source tensor as it is; `source` is its checkpoint's place in the plan."""

    tensor: str
    source: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """Entries of `x` along `dim`: an int drops the dimension (x[i]), a tuple gathers (x[[i, j, ...]])."""

    x: Expression
    dim: int
    index: int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """`x[start:stop]` along `dim`."""

    x: Expression
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts joined along `dim`."""

    parts: tuple[Expression, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Stack:
    """Equally shaped parts as the entries of a new first dimension."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of equally shaped parts, or the weighted mean sum(w * x) / sum(w); computed in float64."""

    parts: tuple[Expression, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class RowMean:
    """The mean of the rows of `x`, as its only row; computed in float64."""

    x: Expression


@dataclass(frozen=True, slots=True)
class Scale:
    """`factor * x`."""

    x: Expression
    factor: float


@dataclass(frozen=True, slots=True)
class AddLowRank:
    """`x + scale * b @ a` with x [out, in], b [out, r], a [r, in] (LoRA, arXiv 2106.09685)."""

    x: Expression
    b: Expression
    a: Expression
    scale: float


@dataclass(frozen=True, slots=True)
class Noise:
    """`x + std * N(0, 1)`, the draws fixed by (plan seed, key)."""

    x: Expression
    std: float
    key: str


@dataclass(frozen=True, slots=True)
class Shuffle:
    """`x` with its entries along `dim` in a random order, fixed by (plan seed, key)."""

    x: Expression
    dim: int
    key: str


@dataclass(frozen=True, slots=True)
class Redraw:
    """`x` with some elements drawn anew from a normal with the mean and deviation of those they replace.

    With `dim`, whole entries along it are replaced: round(fraction * size) of them, the set fixed by (plan seed,
    `choice`), so that several matrices can share one (Drop-Upcycling, arXiv 2502.19261). Without, each element is
    replaced with probability `fraction`. The new values are fixed by (plan seed, `key`).
    """

    x: Expression
    fraction: float
    key: str
    dim: int | None = None
    choice: str = ""


@dataclass(frozen=True, slots=True)
class Init:
    """`std * N(0, 1)` of a given shape, the draws fixed by (plan seed, key)."""

    shape: Shape
    std: float
    key: str


@dataclass(frozen=True, slots=True)
class Uniform:
    """Values uniform on [-bound, bound) of a given shape, the draws fixed by (plan seed, key)."""

    shape: Shape
    bound: float
    key: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A tensor filled with one value."""

    shape: Shape
    value: float


@dataclass(frozen=True, slots=True)
class Dequantise:
    """`(number - zero point) * scale` of a quantised matrix [O, I], in float32 (see `quantised.py`).

    Attributes:
        values: float8 [O, I]; int32 [O, I / numbers per int32], rounded up; or mxfp4 bytes [O, ..., I / 32, 16].
        scales: one per block, [ceil(O / rows), ceil(I / columns)]; any shape if there is only one.
        coding: float8, int4, int8 or mxfp4.
        shape: of the result.
        block: rows and columns that share a scale.
        zero_points: one per scale, int32 packed along the first dimension, or int8 as they are.
        groups: which column of `scales` each column belongs to, where that is not its place; -1 if it is.
    """

    values: Copy
    scales: Copy
    coding: str
    shape: Shape
    block: tuple[int, int]
    zero_points: Copy | None = None
    groups: Copy | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that the plan's `make` makes, with others of its `group`; in `dtype`, of the shape `shape`."""

    tensor: str
    group: str
    dtype: str
    shape: Shape


Expression = (
    Copy
    | Index
    | Slice
    | Concat
    | Stack
    | Mean
    | RowMean
    | Scale
    | AddLowRank
    | Noise
    | Shuffle
    | Redraw
    | Init
    | Uniform
    | Literal
    | Dequantise
    | Made
)
_NODES = {node.__name__: node for node in get_args(Expression)}


def children(x: Expression) -> tuple[Expression, ...]:
    """The direct sub-expressions."""
    match x:
        case Index() | Slice() | RowMean() | Scale() | Noise() | Shuffle() | Redraw():
            return (x.x,)
        case Concat() | Stack() | Mean():
            return x.parts
        case AddLowRank():
            return (x.x, x.b, x.a)
        case Dequantise():
            return tuple(part for part in (x.values, x.scales, x.zero_points, x.groups) if part is not None)
        case _:
            return ()


def substituted(x: Expression, tensors: Mapping[str, Expression]) -> Expression:
    """The expression with other expressions in the place of tensors of the first source."""
    if isinstance(x, Copy):
        return tensors.get(x.tensor, x) if x.source == 0 else x
    if isinstance(x, Dequantise):
        return x
    return _with_children(x, lambda child: substituted(child, tensors))


def moved(x: Expression, place: int) -> Expression:
    """The expression with every source tensor taken from the source at `place`."""
    if isinstance(x, Copy):
        return Copy(x.tensor, place)
    return _with_children(x, lambda child: moved(child, place))


def _with_children(x: Expression, change: Callable[[Expression], Expression]) -> Expression:
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(x):
        value = getattr(x, field.name)
        if isinstance(value, Expression):
            changed[field.name] = change(value)
        elif field.name == "parts":
            changed[field.name] = tuple(change(part) for part in value)
    return dataclasses.replace(x, **changed)


def numbers_read(x: Expression) -> Iterator[Copy]:
    """Like `leaves`, less those that are codes to look up rather than numbers to compute with."""
    if isinstance(x, Copy):
        yield x
    elif not isinstance(x, Dequantise):
        for child in children(x):
            yield from numbers_read(child)


def leaves(x: Expression) -> Iterator[Copy]:
    """Every source tensor the expression reads."""
    if isinstance(x, Copy):
        yield x
    for child in children(x):
        yield from leaves(child)


def shape_of(x: Expression, sources: Sequence[Checkpoint]) -> Shape:
    """The shape of the result. Plans are built by moectl, so a shape that does not fit is a bug, not bad input."""
    match x:
        case Copy():
            return sources[x.source].tensors[x.tensor].shape
        case Init() | Uniform() | Literal() | Dequantise() | Made():
            return x.shape
        case Scale() | Noise() | Shuffle() | Redraw():
            return shape_of(x.x, sources)
        case AddLowRank():
            shape, b, a = (shape_of(part, sources) for part in (x.x, x.b, x.a))
            assert shape == (b[0], a[1]) and b[1] == a[0], f"low-rank shapes {b} @ {a} do not fit {shape}"
            return shape
        case Stack():
            (shape,) = {shape_of(part, sources) for part in x.parts}
            return (len(x.parts), *shape)
        case Mean():
            shapes = {shape_of(part, sources) for part in x.parts}
            assert len(shapes) == 1, f"mean of different shapes {shapes}"
            assert x.weights is None or len(x.weights) == len(x.parts)
            return shapes.pop()
        case RowMean():
            return _replaced(shape_of(x.x, sources), 0, 1)
        case Slice():
            shape = shape_of(x.x, sources)
            assert 0 <= x.start <= x.stop <= shape[x.dim], f"slice {x.start}:{x.stop} of {shape}"
            return _replaced(shape, x.dim, x.stop - x.start)
        case Index():
            shape = shape_of(x.x, sources)
            wanted = (x.index,) if isinstance(x.index, int) else x.index
            assert all(0 <= i < shape[x.dim] for i in wanted), f"index {wanted} of {shape}"
            if isinstance(x.index, int):
                return shape[: x.dim] + shape[x.dim + 1 :]
            return _replaced(shape, x.dim, len(x.index))
        case Concat():
            parts = [shape_of(part, sources) for part in x.parts]
            assert len({_replaced(shape, x.dim, 0) for shape in parts}) == 1, f"concat of {parts}"
            return _replaced(parts[0], x.dim, sum(shape[x.dim] for shape in parts))


def _replaced(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file."""

    file: Path
    offset: int
    nbytes: int


def extents(x: Expression, sources: Sequence[Checkpoint], dtype: str) -> tuple[Extent, ...] | None:
    """The source bytes that are the result as `dtype`, in order; None when it has to be computed."""
    match x:
        case Copy():
            ref = sources[x.source].tensors[x.tensor]
            return (Extent(ref.file, ref.offset, ref.nbytes),) if ref.dtype == dtype else None
        case Slice(dim=0, start=start, stop=stop):
            return _rows(x.x, sources, dtype, start, stop)
        case Index(dim=0, index=int(i)):
            return _rows(x.x, sources, dtype, i, i + 1)
        case Concat(dim=0) | Stack():
            parts = [extents(part, sources, dtype) for part in x.parts]
            if any(part is None for part in parts):
                return None
            return tuple(extent for part in parts for extent in part or ())
        case _:
            return None


def _rows(x: Expression, sources: Sequence[Checkpoint], dtype: str, start: int, stop: int) -> tuple[Extent, ...] | None:
    whole = extents(x, sources, dtype)
    row = math.prod(shape_of(x, sources)[1:]) * ITEM_BYTES[dtype]
    return None if whole is None else cut(whole, start * row, stop * row)


def cut(whole: Sequence[Extent], start: int, stop: int) -> tuple[Extent, ...]:
    """Bytes `start` to `stop` of a sequence of extents."""
    result, position = [], 0
    for extent in whole:
        first, last = max(start - position, 0), min(stop - position, extent.nbytes)
        if first < last:
            result.append(Extent(extent.file, extent.offset + first, last - first))
        position += extent.nbytes
    return tuple(result)


def to_json(x: Expression) -> dict[str, Any]:
    """The expression as plain JSON: {"op": name, field: value, ...}."""
    fields = {field.name: _encode(getattr(x, field.name)) for field in dataclasses.fields(x)}
    return {"op": type(x).__name__, **fields}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)  # type: ignore[arg-type]
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def from_json(data: dict[str, Any]) -> Expression:
    """The inverse of `to_json`."""
    fields = {name: _decode(value) for name, value in data.items() if name != "op"}
    result: Expression = _NODES[data["op"]](**fields)
    return result


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return from_json(value)
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value
