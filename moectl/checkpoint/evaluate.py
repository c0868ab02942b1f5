"""Compute an expression in float64, some rows at a time, and round once to the output type.

Rows are the first dimension of the result, so the memory needed is a few chunks, whatever the tensor's size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain

import ml_dtypes
import numpy as np

from moectl.checkpoint.dtypes import ITEM_BYTES, numpy_dtype
from moectl.checkpoint.expressions import (
    AddLowRank,
    Concat,
    Copy,
    Expression,
    Extent,
    Index,
    Init,
    Literal,
    Mean,
    Noise,
    Scale,
    Slice,
    Stack,
    cut,
    extents,
    leaves,
    shape_of,
)
from moectl.checkpoint.plan import OutputTensor
from moectl.checkpoint.randomness import normal
from moectl.checkpoint.source import Checkpoint, changed
from moectl.errors import InputError

CHUNK_ELEMENTS = 1 << 20
Rows = tuple[int, int]


def evaluate(tensor: OutputTensor, sources: Sequence[Checkpoint], seed: int) -> Iterator[bytes]:
    """The bytes of a tensor, in chunks of about a million elements.

    Raises:
        InputError: a value is NaN or infinite, in the source or in the type asked for.
    """
    evaluator = _Evaluator(sources, seed)
    for values in chain.from_iterable(evaluator.chunks(part) for part in _sequence(tensor.expression)):
        result = cast(values, tensor.dtype)
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
        error = np.where(np.isfinite(single), values - single.astype(np.float64), 0.0)
    bits = single.view(np.uint32).copy()
    away = (error != 0) & ((error > 0) != (values > 0))  # rounded away from zero: step back before setting the bit
    bits = np.where(away, bits - 1, bits)
    bits = np.where(error != 0, bits | 1, bits).astype(np.uint32)
    return bits.view(np.float32).astype(ml_dtypes.bfloat16)


class _Evaluator:
    def __init__(self, sources: Sequence[Checkpoint], seed: int) -> None:
        self.sources = sources
        self.seed = seed

    def chunks(self, x: Expression) -> Iterator[np.ndarray]:
        """The whole result in pieces of as many rows as make about a million elements."""
        shape = shape_of(x, self.sources) or (1,)
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield self.rows(x, (start, min(start + step, shape[0])))

    def rows(self, x: Expression, rows: Rows) -> np.ndarray:
        """Rows `start` to `stop` of the result: float64 [stop - start, *shape[1:]]."""
        start, stop = rows
        shape = shape_of(x, self.sources) or (1,)
        size = math.prod(shape[1:])
        stored = self._stored(x)
        if stored is not None:
            dtype, ranges = stored
            item = ITEM_BYTES[dtype] * size
            raw = _read(cut(ranges, start * item, stop * item))
            return np.frombuffer(raw, numpy_dtype(dtype)).astype(np.float64).reshape(stop - start, *shape[1:])
        match x:
            case Slice(dim=0):
                return self.rows(x.x, (x.start + start, x.start + stop))
            case Slice():
                return self.rows(x.x, rows)[(slice(None),) * x.dim + (slice(x.start, x.stop),)]
            case Index(dim=0, index=int(i)):
                return self.rows(x.x, (i, i + 1))[0][start:stop]
            case Index(dim=0, index=tuple(wanted)):
                return np.concatenate([self.rows(x.x, (i, i + 1)) for i in wanted[start:stop]])
            case Index():
                return np.take(self.rows(x.x, rows), x.index, axis=x.dim)
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
            case Scale():
                return x.factor * self.rows(x.x, rows)
            case AddLowRank():
                a_rows = shape_of(x.a, self.sources)[0]
                return self.rows(x.x, rows) + x.scale * (self.rows(x.b, rows) @ self.rows(x.a, (0, a_rows)))
            case Noise():
                draws = normal(self.seed, x.key, start * size, stop * size)
                return self.rows(x.x, rows) + x.std * draws.reshape(stop - start, *shape[1:])
            case Init():
                draws = normal(self.seed, x.key, start * size, stop * size)
                return x.std * draws.reshape(stop - start, *shape[1:])
            case Literal():
                return np.full((stop - start, *shape[1:]), x.value)
            case Copy():
                raise AssertionError("a source tensor is always stored")

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
    for extent in ranges:
        descriptor = os.open(extent.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            piece = os.pread(descriptor, extent.nbytes, extent.offset)
        finally:
            os.close(descriptor)
        if len(piece) != extent.nbytes:
            raise changed(extent.file, "ended while it was read")
        pieces.append(piece)
    return b"".join(pieces)
