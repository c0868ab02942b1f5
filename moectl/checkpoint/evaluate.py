"""Compute an expression in float64, some rows at a time, and round once to the output type.

Rows are the first dimension of the result, so the memory needed is a few chunks, whatever the tensor's size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby

import ml_dtypes
import numpy as np

from moectl.checkpoint import quantised
from moectl.checkpoint.dtypes import ITEM_BYTES, numpy_dtype
from moectl.checkpoint.expressions import (
    AddLowRank,
    Concat,
    Copy,
    Dequantise,
    Expression,
    Extent,
    Index,
    Init,
    Literal,
    Made,
    Mean,
    Noise,
    Redraw,
    RowMean,
    Scale,
    Shuffle,
    Slice,
    Stack,
    Uniform,
    cut,
    extents,
    leaves,
    shape_of,
)
from moectl.checkpoint.plan import Make, OutputTensor
from moectl.checkpoint.randomness import normal, permutation, uniform
from moectl.checkpoint.source import Checkpoint, changed
from moectl.errors import InputError
from moectl.text import escape

CHUNK_ELEMENTS = 1 << 20
Rows = tuple[int, int]


def evaluate(
    tensor: OutputTensor, sources: Sequence[Checkpoint], seed: int, make: Make | None = None
) -> Iterator[bytes]:
    """The bytes of a tensor, in chunks of about a million elements.

    What is made in the type that is asked for passes as it is.

    Raises:
        InputError: a value is NaN or infinite, in the source or in the type asked for.
    """
    evaluator = _Evaluator(sources, seed, make)
    for values in chain.from_iterable(evaluator.chunks(part, tensor.dtype) for part in _sequence(tensor.expression)):
        result = values if values.dtype == numpy_dtype(tensor.dtype) else cast(values, tensor.dtype)
        if not np.isfinite(result).all():
            largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
            raise InputError(
                f"Tensor {tensor.name!r} would hold NaN or infinite values as {tensor.dtype}.",
                f"Its finite values reach {largest:.3g}; {describe(tensor.expression)}.",
                "Look at the source with `moectl inspect SOURCE --weights`, or choose a wider --dtype.",
            )
        yield result.tobytes()


def _sequence(x: Expression) -> Iterator[Expression]:
    """Parts that lie one after the other in the result: each can be computed by itself."""
    if isinstance(x, Stack) or (isinstance(x, Concat) and x.dim == 0):
        for part in x.parts:
            yield from _sequence(part)
    else:
        yield x


def describe(x: Expression) -> str:
    """Which source tensors an expression reads, for messages."""
    if isinstance(x, Made):
        return f"it is made from {x.group}"
    names = sorted({leaf.tensor for leaf in leaves(x)})
    return f"it is computed from {', '.join(names)}" if names else "it is drawn at random"


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded once, to nearest even, to a safetensors type."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(numpy_dtype(dtype))
    # float64 -> bfloat16 goes through float32 in ml_dtypes, which rounds twice; rounding the first step to odd
    # makes the second one exact (Boldo & Melquiond, IEEE TC 2008).
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if (single == values).all():  # no first rounding, and twice as fast: all that is only read or dequantised
            return single.astype(ml_dtypes.bfloat16)
        error = np.where(np.isfinite(single), values - single.astype(np.float64), 0.0)
    bits = single.view(np.uint32).copy()
    away = (error != 0) & ((error > 0) != (values > 0))  # rounded away from zero: step back before setting the bit
    bits = np.where(away, bits - 1, bits)
    bits = np.where(error != 0, bits | 1, bits).astype(np.uint32)
    return bits.view(np.float32).astype(ml_dtypes.bfloat16)


class _Evaluator:
    def __init__(self, sources: Sequence[Checkpoint], seed: int, make: Make | None) -> None:
        self.sources = sources
        self.seed = seed
        self.make = make
        self._moments: dict[Redraw, tuple[float, float]] = {}

    def chunks(self, x: Expression, dtype: str = "F64") -> Iterator[np.ndarray]:
        """The whole result in pieces of about a million elements: in float64, unless it is made in `dtype`."""
        shape = shape_of(x, self.sources) or (1,)
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            rows = (start, min(start + step, shape[0]))
            yield self._made(x, rows) if isinstance(x, Made) and x.dtype == dtype else self.rows(x, rows)

    def rows(self, x: Expression, rows: Rows) -> np.ndarray:
        """Rows `start` to `stop` of the result: float64 [stop - start, *shape[1:]]."""
        start, stop = rows
        shape = shape_of(x, self.sources) or (1,)
        size = math.prod(shape[1:])
        stored = self._stored_rows(x, rows)
        if stored is not None:
            return stored.astype(np.float64)
        match x:
            case Slice(dim=0):
                return self.rows(x.x, (x.start + start, x.start + stop))
            case Slice():
                return self.rows(x.x, rows)[(slice(None),) * x.dim + (slice(x.start, x.stop),)]
            case Index(dim=0, index=int(i)):
                return self.rows(x.x, (i, i + 1))[0][start:stop]
            case Index(dim=0, index=tuple(wanted)):
                return self._gather(x.x, wanted[start:stop])
            case Index():
                whole = self._stored_rows(x.x, rows)  # few of many columns: choose first, widen then
                whole = self.rows(x.x, rows) if whole is None else whole
                return np.take(whole, x.index, axis=x.dim).astype(np.float64)
            case Stack():
                parts = x.parts[start:stop]
                return np.stack([self.rows(part, (0, shape[1] if len(shape) > 1 else 1)) for part in parts])
            case Concat(dim=0):
                return np.concatenate(list(self._concat_rows(x, rows)))
            case Concat():
                return np.concatenate([self.rows(part, rows) for part in x.parts], axis=x.dim)
            case Mean():
                weights = x.weights or (1.0,) * len(x.parts)
                total = sum(weight * self.rows(part, rows) for part, weight in zip(x.parts, weights, strict=True))
                return np.asarray(total) / math.fsum(weights)
            case RowMean():
                total = sum(values.sum(axis=0, keepdims=True) for values in self.chunks(x.x))
                return np.asarray(total)[start:stop] / shape_of(x.x, self.sources)[0]
            case Scale():
                return x.factor * self.rows(x.x, rows)
            case AddLowRank():
                a_rows = shape_of(x.a, self.sources)[0]
                return self.rows(x.x, rows) + x.scale * (self.rows(x.b, rows) @ self.rows(x.a, (0, a_rows)))
            case Noise():
                draws = normal(self.seed, x.key, start * size, stop * size)
                return self.rows(x.x, rows) + x.std * draws.reshape(stop - start, *shape[1:])
            case Shuffle(dim=0):
                return self._gather(x.x, permutation(self.seed, x.key, shape[0])[start:stop])
            case Shuffle():
                return np.take(self.rows(x.x, rows), permutation(self.seed, x.key, shape[x.dim]), axis=x.dim)
            case Redraw():
                mean, std = self._redrawn_moments(x)
                draws = normal(self.seed, x.key, start * size, stop * size).reshape(stop - start, *shape[1:])
                return np.where(self._redrawn(x, shape, rows), mean + std * draws, self.rows(x.x, rows))
            case Init():
                draws = normal(self.seed, x.key, start * size, stop * size)
                return x.std * draws.reshape(stop - start, *shape[1:])
            case Uniform():
                draws = uniform(self.seed, x.key, start * size, stop * size)
                return x.bound * (2 * draws - 1).reshape(stop - start, *shape[1:])
            case Literal():
                return np.full((stop - start, *shape[1:]), x.value)
            case Dequantise():
                return self._dequantised(x, rows)
            case Made():
                return self._made(x, rows).astype(np.float64)
            case Copy():
                raise AssertionError("a source tensor is always stored")

    def _made(self, x: Made, rows: Rows) -> np.ndarray:
        assert self.make is not None, "a plan with what is made says how"
        made = self.make(x.group)[x.tensor]
        assert made.shape == x.shape and made.dtype == numpy_dtype(x.dtype), f"{made.dtype} {made.shape} for {x}"
        return made.reshape(x.shape or (1,))[slice(*rows)]

    def _dequantised(self, x: Dequantise, rows: Rows) -> np.ndarray:
        start, stop = rows
        tall, wide = x.block
        columns = x.shape[-1]
        scales = quantised.scale_factors(self._raw(x.scales, (start // tall, (stop - 1) // tall + 1)))
        scales = scales if scales.ndim > 1 else scales.reshape(-1, 1)
        which = np.arange(start, stop) // tall - start // tall
        groups = self._groups(x, scales.shape[-1])

        def spread(per_block: np.ndarray) -> np.ndarray:
            if groups is not None:
                return per_block[..., groups]
            return np.repeat(per_block, wide, axis=-1)[..., :columns]

        result = quantised.numbers(self._raw(x.values, rows), x.coding)[..., :columns]
        if x.zero_points is None:
            result = result - np.float32(quantised.offset(x.coding))
        else:
            result = result - spread(self._zero_points(x.zero_points, x.coding, rows))
        with np.errstate(over="ignore", invalid="ignore"):
            result *= spread(scales)[which] if tall > 1 else spread(scales)
        return result.astype(np.float64)

    def _zero_points(self, x: Copy, coding: str, rows: Rows) -> np.ndarray:
        """Zero points of some rows as they are stored in an unsigned type: float32 [stop - start, G]."""
        start, stop = rows
        if self.sources[x.source].tensors[x.tensor].dtype == "I8":
            return self._raw(x, rows).astype(np.float32) + np.float32(quantised.offset(coding))
        each = {"int4": 8, "int8": 4}[coding]
        first = start // each
        unpacked = quantised.numbers_of_columns(self._raw(x, (first, (stop - 1) // each + 1)), coding)
        return unpacked[start - first * each : stop - first * each]

    def _groups(self, x: Dequantise, number: int) -> np.ndarray | None:
        if x.groups is None:
            return None
        groups = self._raw(x.groups, (0, x.shape[-1]))
        if (groups == -1).any():
            return None
        if groups.min() < 0 or groups.max() >= number:
            file = self.sources[x.groups.source].tensors[x.groups.tensor].file
            raise InputError(
                f"{escape(str(file))}: tensor {escape(x.groups.tensor)!r} holds {groups.min()} to {groups.max()}, "
                f"expected groups from 0 to {number - 1}.",
                "The scale of those columns is unknown.",
                "Fetch the checkpoint again, or give the unquantised one.",
            )
        return groups

    def _raw(self, x: Copy, rows: Rows) -> np.ndarray:
        stored = self._stored_rows(x, rows)
        assert stored is not None, "a source tensor is always stored"
        return stored

    def _stored_rows(self, x: Expression, rows: Rows) -> np.ndarray | None:
        """Rows of what lies in the files as such, in the type it has there."""
        stored = self._stored(x)
        if stored is None:
            return None
        dtype, ranges = stored
        start, stop = rows
        shape = shape_of(x, self.sources) or (1,)
        item = ITEM_BYTES[dtype] * math.prod(shape[1:])
        raw = _read(cut(ranges, start * item, stop * item))
        return np.frombuffer(raw, numpy_dtype(dtype)).reshape(stop - start, *shape[1:])

    def _gather(self, x: Expression, wanted: Iterable[int]) -> np.ndarray:
        stored = self._stored(x)
        if stored is None:
            return np.concatenate([self.rows(x, (int(i), int(i) + 1)) for i in wanted])
        dtype, ranges = stored
        shape = shape_of(x, self.sources)
        item = ITEM_BYTES[dtype] * math.prod(shape[1:])
        raw = _read([extent for i in wanted for extent in cut(ranges, int(i) * item, (int(i) + 1) * item)])
        return np.frombuffer(raw, numpy_dtype(dtype)).reshape(-1, *shape[1:]).astype(np.float64)

    def _redrawn(self, x: Redraw, shape: tuple[int, ...], rows: Rows) -> np.ndarray:
        """Which elements of some rows are replaced: booleans that broadcast to [stop - start, *shape[1:]]."""
        start, stop = rows
        if x.dim is None:
            size = math.prod(shape[1:])
            draws = uniform(self.seed, f"{x.key}/which", start * size, stop * size)
            return (draws < x.fraction).reshape(stop - start, *shape[1:])
        chosen = np.zeros(shape[x.dim], dtype=bool)
        chosen[permutation(self.seed, x.choice, shape[x.dim])[: round(x.fraction * shape[x.dim])]] = True
        along = chosen.reshape([-1 if dim == x.dim else 1 for dim in range(len(shape))])
        return along[start:stop] if x.dim == 0 else along

    def _redrawn_moments(self, x: Redraw) -> tuple[float, float]:
        """Mean and standard deviation of the elements that are replaced, from one pass over the tensor."""
        if x not in self._moments:
            shape = shape_of(x.x, self.sources)
            count, total, squares, start = 0, 0.0, 0.0, 0
            for values in self.chunks(x.x):
                rows = (start, start + len(values))
                replaced = values[np.broadcast_to(self._redrawn(x, shape, rows), values.shape)]
                count += replaced.size
                total += float(replaced.sum())
                squares += float((replaced**2).sum())
                start = rows[1]
            mean = total / max(count, 1)
            self._moments[x] = (mean, math.sqrt(max(squares / max(count, 1) - mean**2, 0.0)))
        return self._moments[x]

    def _stored(self, x: Expression) -> tuple[str, tuple[Extent, ...]] | None:
        dtypes = {self.sources[leaf.source].tensors[leaf.tensor].dtype for leaf in leaves(x)}
        if len(dtypes) != 1:
            return None
        (dtype,) = dtypes
        ranges = extents(x, self.sources, dtype)
        return None if ranges is None else (dtype, ranges)

    def _concat_rows(self, x: Concat, rows: Rows) -> Iterator[np.ndarray]:
        position = 0
        for part in x.parts:
            length = shape_of(part, self.sources)[0]
            first, last = max(rows[0] - position, 0), min(rows[1] - position, length)
            if first < last:
                yield self.rows(part, (first, last))
            position += length


def _read(ranges: Sequence[Extent]) -> bytes:
    pieces = []
    for file, extents_of_file in groupby(ranges, key=lambda extent: extent.file):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for extent in extents_of_file:
                pieces.append(os.pread(descriptor, extent.nbytes, extent.offset))
                if len(pieces[-1]) != extent.nbytes:
                    raise changed(file, "ended while it was read")
        finally:
            os.close(descriptor)
    return b"".join(pieces)
