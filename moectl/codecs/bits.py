"""Small whole numbers in rows of bytes: number i takes bits i * B to i * B + B - 1 of its row.

Bit k of a row is bit k % 8, from the lowest, of its byte k // 8. A row ends with a whole byte; what is left of it is 0.
"""

from __future__ import annotations

from math import prod

import numpy as np

from moectl.compiled import compiled

CHUNK = 1 << 20
"""Bits that are packed at once: while they are, each is a byte."""


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers [..., N] as rows of bytes, uint8 [..., ceil(N * bits / 8)].

    Raises:
        ValueError: a number takes more bits.
    """
    if numbers.dtype != np.uint8 or numbers.max(initial=0) >> bits:
        raise ValueError(f"numbers of {bits} bits are uint8 below {1 << bits}")
    *front, width = numbers.shape
    number_RN, place_B = numbers.reshape(prod(front), width), np.arange(bits, dtype=np.uint8)
    row_bytes = np.empty((len(number_RN), -(-width * bits // 8)), np.uint8)
    rows = max(1, CHUNK // max(width * bits, 1))
    for start in range(0, len(number_RN), rows):
        bit_RNB = number_RN[start : start + rows, :, None] >> place_B & 1
        bit_RC = bit_RNB.reshape(len(bit_RNB), width * bits)
        row_bytes[start : start + rows] = np.packbits(bit_RC, axis=1, bitorder="little")
    return row_bytes.reshape(*front, row_bytes.shape[-1])


def unpacked(row_bytes: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The numbers of rows of bytes, uint8 [..., width]."""
    front = row_bytes.shape[:-1]
    numbers = np.tile(np.arange(1 << bits, dtype=np.uint8), (prod(front), 1, 1))
    return looked_up(row_bytes, bits, width, numbers, max(1, width))


def looked_up(row_bytes: np.ndarray, bits: int, width: int, value_RSV: np.ndarray, group: int) -> np.ndarray:
    """What the numbers of rows of bytes stand for, [..., width].

    Args:
        row_bytes: as `packed` gives them.
        bits: of a number.
        width: numbers in a row.
        value_RSV: for each row and each group of a row what the 2^bits numbers stand for; 1, 2 or 4 bytes each.
        group: numbers in a group.
    """
    *front, length = row_bytes.shape
    unsigned = np.dtype(f"u{value_RSV.dtype.itemsize}")
    value_RN = np.empty((prod(front), width), unsigned)
    raw = np.ascontiguousarray(row_bytes).reshape(prod(front), length)
    _look_up(raw, bits, np.ascontiguousarray(value_RSV).view(unsigned), group, value_RN)
    return value_RN.view(value_RSV.dtype).reshape(*front, width)


@compiled
def _look_up(row_bytes: np.ndarray, bits: int, value_RSV: np.ndarray, group: int, value_RN: np.ndarray) -> None:
    rows, width = value_RN.shape
    mask = (1 << bits) - 1
    for row in range(rows):
        held, have, at = np.int64(0), 0, 0
        for start in range(0, width, group):
            values = value_RSV[row, start // group]
            for column in range(start, min(width, start + group)):
                if have < bits:
                    held |= np.int64(row_bytes[row, at]) << have
                    have += 8
                    at += 1
                value_RN[row, column] = values[held & mask]
                held >>= bits
                have -= bits
