"""A matrix of 2, 3 or 4 bits a weight, or a stack of them, as tensors. docs/format-qmoe.md describes them in full.

    NAME.about    int32 [5]                      version, bits, weights in a row, weights in a group, flags
    NAME.packed   uint8 [..., R, bytes]          the weights of each row, bits one after another
    NAME.scales   bfloat16|float16|float32 [..., R, S]   of each group
    NAME.zeros    uint8 [..., R, bytes]          the number that stands for zero in each group; absent: half of all

Unlike in `moectl.codecs.blob`, every row has the same size, so that rows and groups are found without counting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from moectl.codecs.bits import looked_up, packed, unpacked
from moectl.codecs.checks import FLOATS, TRANSPOSED, VERSION, about, part, require

PARTS = ("about", "packed", "scales", "zeros")
BITS = (2, 3, 4)
ABOUT_NUMBERS = 5


@dataclass(frozen=True, slots=True)
class GridBlob:
    """Rows of N weights, each a whole number of `bits` bits, in groups that have a scale and a zero of their own.

    Attributes:
        bits: 2, 3 or 4.
        width: N.
        group: weights in a group; the last of a row may have fewer.
        packed: uint8 [..., R, bytes of a row].
        scales: [..., R, S] of a type in `FLOATS`.
        zeros: uint8 [..., R, bytes of a row's], or None where 2^(bits - 1) stands for zero in all groups.
        name: how its tensors are called, for messages.
        transposed: the parameter of this name is the transpose of each matrix.
    """

    bits: int
    width: int
    group: int
    packed: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    name: str = "the matrix"
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix: [..., R, N]."""
        return (*self.scales.shape[:-1], self.width)

    def numbers(self) -> np.ndarray:
        """What is packed, 0 to 2^bits - 1, uint8 [..., R, N]."""
        return unpacked(self.packed, self.bits, self.width)

    def points(self) -> np.ndarray:
        """The number that stands for zero in each group, uint8 [..., R, S]."""
        if self.zeros is None:
            return np.full(self.scales.shape, 1 << self.bits - 1, np.uint8)
        return unpacked(self.zeros, self.bits, self.scales.shape[-1])

    def weights(self) -> np.ndarray:
        """The matrix [..., R, N], of the type of its scales: (number - zero) * scale in float32, rounded to it."""
        steps = np.arange(1 << self.bits, dtype=np.float32)
        values = (steps - self.points()[..., None]) * self.scales[..., None].astype(np.float32)
        values = values.astype(self.scales.dtype).reshape(prod(self.shape[:-1]), *values.shape[-2:])
        return looked_up(self.packed, self.bits, self.width, values, self.group)

    def tensors(self) -> dict[str, np.ndarray]:
        """What to write."""
        numbers = [VERSION, self.bits, self.width, self.group, TRANSPOSED * self.transposed]
        parts = (np.array(numbers, np.int32), self.packed, self.scales, self.zeros)
        named = zip(PARTS, parts, strict=True)
        return {f"{self.name}.{suffix}": tensor for suffix, tensor in named if tensor is not None}


def pack(
    numbers: np.ndarray,
    scales: np.ndarray,
    points: np.ndarray | None,
    bits: int,
    group: int,
    name: str = "the matrix",
    *,
    transposed: bool = False,
) -> GridBlob:
    """Whole numbers as a blob.

    Args:
        numbers: uint8 [..., R, N], 0 to 2^bits - 1.
        scales: [..., R, S], one for each group.
        points: uint8 [..., R, S], the number that stands for zero; None where it is 2^(bits - 1) everywhere.
        bits: 2, 3 or 4.
        group: weights in a group, at least 1.
        name: of the matrix.
        transposed: what to note about the parameter; the matrix is taken as it is.

    Raises:
        ValueError: they do not fit together or need more bits.
    """
    groups = (*numbers.shape[:-1], _groups(numbers.shape[-1], group))
    if scales.shape != groups or scales.dtype.name not in FLOATS or (points is not None and points.shape != groups):
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)} for weights {list(numbers.shape)} by {group}")
    zeros = None if points is None else packed(points, bits)
    return GridBlob(bits, numbers.shape[-1], group, packed(numbers, bits), scales, zeros, name, transposed)


def parse(name: str, tensors: Mapping[str, np.ndarray]) -> GridBlob:
    """The blob of a matrix among tensors that were read.

    Raises:
        InputError: a tensor is missing, has another type or shape, or they do not fit together: it is named.
    """
    bits, width, group, flags = about(tensors, name, ABOUT_NUMBERS)
    rows, scales = (part(tensors, f"{name}.{suffix}") for suffix in PARTS[1:3])
    zeros = tensors.get(f"{name}.zeros")
    require(bits in BITS and width >= 0 and group > 0, f"{name}.about", f"{bits} bits, {width} weights by {group}")
    fits = scales.dtype.name in FLOATS and scales.ndim > 1 and scales.shape[-1] == _groups(width, group)
    require(fits, f"{name}.scales", f"it is {scales.dtype} {list(scales.shape)} for {width} weights by {group}")
    for tensor, called, count in ((rows, "packed", width), (zeros, "zeros", scales.shape[-1])):
        if tensor is not None:
            fits = tensor.dtype == np.uint8 and tensor.shape == (*scales.shape[:-1], -(-count * bits // 8))
            require(fits, f"{name}.{called}", f"it is {tensor.dtype} {list(tensor.shape)} for {list(scales.shape)}")
    return GridBlob(bits, width, group, rows, scales, zeros, name, bool(flags & TRANSPOSED))


def _groups(width: int, group: int) -> int:
    return -(-width // group)
