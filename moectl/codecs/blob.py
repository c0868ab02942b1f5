"""One ternary matrix, or a stack of them, as four safetensors tensors. docs/format-qmoe.md describes them in full.

    NAME.about    int32 [4]                      version, number of the code table, weights in a row, flags
    NAME.codes    uint16 [codewords]             of all rows, one after another
    NAME.counts   uint16 [..., R]                how many codewords each row has
    NAME.levels   bfloat16|float16|float32 [..., R, 2]     what - and + stand for in each row

Tensors alone, because whatever copies a checkpoint keeps them, while metadata of files is dropped by many tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from moectl.codecs.checks import FLOATS, TRANSPOSED, VERSION, about, damaged, part, require
from moectl.codecs.encoding import check, decode, encode
from moectl.codecs.tables import choose, table

PARTS = ("about", "codes", "counts", "levels")
ABOUT_NUMBERS = 4

_SIGNS = np.array([-1, 1], np.int8)


@dataclass(frozen=True, slots=True)
class Blob:
    """Coded rows of N weights each; R is every dimension but the last.

    Attributes:
        number: of the code table.
        width: N.
        codes: uint16 [codewords].
        counts: uint16 [R].
        levels: what - and + stand for, [R, 2] of a type in `FLOATS`.
        name: how its tensors are called, for messages.
        transposed: the parameter of this name is the transpose of each matrix: rows are coded, whichever way they lie
            in the model.
    """

    number: int
    width: int
    codes: np.ndarray
    counts: np.ndarray
    levels: np.ndarray
    name: str = "the matrix"
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix: [R, N]."""
        return (*self.counts.shape, self.width)

    def weights(self) -> np.ndarray:
        """The matrix [R, N], of the type of its levels: bit-equal to what was quantised, with +0 for every zero.

        Raises:
            InputError: the codewords are not those of such a matrix.
        """
        return self._decoded(self.levels)

    def trits(self) -> np.ndarray:
        """The matrix as -1, 0 and 1, int8 [R, N].

        Raises:
            InputError: the codewords are not those of such a matrix.
        """
        return self._decoded(np.broadcast_to(_SIGNS, (*self.counts.shape, 2)))

    def check(self) -> None:
        """Make sure that its codewords are those of such a matrix, in a fraction of the time that decoding takes.

        Raises:
            InputError: they are not.
        """
        try:
            check(self.codes, self.counts.ravel(), table(self.number), self.width)
        except ValueError as error:
            raise damaged(f"{self.name}.codes", str(error)) from None

    def tensors(self) -> dict[str, np.ndarray]:
        """What to write."""
        numbers = np.array([VERSION, self.number, self.width, TRANSPOSED * self.transposed], np.int32)
        parts = (numbers, self.codes, self.counts, self.levels)
        return {f"{self.name}.{suffix}": tensor for suffix, tensor in zip(PARTS, parts, strict=True)}

    def _decoded(self, values: np.ndarray) -> np.ndarray:
        try:
            rows = decode(self.codes, self.counts.ravel(), table(self.number), values.reshape(-1, 2), self.width)
        except ValueError as error:
            raise damaged(f"{self.name}.codes", str(error)) from None
        return rows.reshape(self.shape)


def pack(
    trits: np.ndarray,
    levels: np.ndarray,
    name: str = "the matrix",
    number: int | None = None,
    *,
    transposed: bool = False,
) -> Blob:
    """A matrix of -1, 0 and 1 as a blob, with the table that suits its share of zeros unless one is given.

    Args:
        trits: integers [R, N], any dimensions before.
        levels: what - and + stand for in each row, [R, 2].
        name: of the matrix.
        number: of the code table.
        transposed: what to note about the parameter; the matrix is taken as it is.

    Raises:
        ValueError: levels do not fit, a weight is not -1, 0 or 1, or a row is longer than can be counted.
    """
    if trits.ndim < 2 or levels.shape != (*trits.shape[:-1], 2) or levels.dtype.name not in FLOATS:
        raise ValueError(f"levels are {levels.dtype} {list(levels.shape)} for ternary weights {list(trits.shape)}")
    rows = trits.reshape(prod(trits.shape[:-1]), trits.shape[-1])
    if number is None:
        number = choose(1 - np.count_nonzero(rows) / max(1, rows.size))
    codes, counts = encode(rows, table(number))
    return Blob(number, trits.shape[-1], codes, counts.reshape(trits.shape[:-1]), levels, name, transposed)


def parse(name: str, tensors: Mapping[str, np.ndarray]) -> Blob:
    """The blob of a matrix among tensors that were read. Codewords are checked when they are decoded.

    Raises:
        InputError: a tensor is missing, has another type or shape, or they do not fit together: it is named.
    """
    number, width, flags = about(tensors, name, ABOUT_NUMBERS)
    codes, counts, levels = (part(tensors, f"{name}.{suffix}") for suffix in PARTS[1:])
    require(codes.dtype == np.uint16 and codes.ndim == 1, f"{name}.codes", "it is no list of uint16")
    require(counts.dtype == np.uint16 and counts.ndim > 0, f"{name}.counts", "it is no list of uint16")
    fits = levels.shape == (*counts.shape, 2) and levels.dtype.name in FLOATS
    require(fits, f"{name}.levels", f"it is {levels.dtype} {list(levels.shape)} for counts {list(counts.shape)}")
    counted = int(counts.sum(dtype=np.int64))
    require(counted == len(codes), f"{name}.counts", f"it adds up to {counted}, and there are {len(codes)} codewords")
    require(width >= 0, f"{name}.about", f"a row has {width} weights")
    try:
        table(number)
    except ValueError as error:
        raise damaged(f"{name}.about", str(error)) from None
    return Blob(number, width, codes, counts, levels, name, bool(flags & TRANSPOSED))
