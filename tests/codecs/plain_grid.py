"""The uniform grids of docs/format-qmoe.md once more, with Python's whole numbers of any length: slow, independent."""

from __future__ import annotations

import numpy as np


def pack(rows: list[list[int]], bits: int) -> list[list[int]]:
    """Bytes of rows of numbers."""
    length = -(-len(rows[0]) * bits // 8) if rows else 0
    return [list(sum(number << bits * at for at, number in enumerate(row)).to_bytes(length, "little")) for row in rows]


def unpack(rows: list[list[int]], bits: int, width: int) -> list[list[int]]:
    """Numbers of rows of bytes."""
    return [[int.from_bytes(row, "little") >> bits * at & (1 << bits) - 1 for at in range(width)] for row in rows]


def weights(numbers: np.ndarray, scales: np.ndarray, points: np.ndarray, group: int) -> np.ndarray:
    """The matrix, weight by weight."""
    matrix = np.zeros(numbers.shape, scales.dtype)
    for row, column in np.ndindex(*numbers.shape):
        at = row, column // group
        step = np.float32(int(numbers[row, column]) - int(points[at]))
        matrix[row, column] = (step * np.float32(scales[at])).astype(scales.dtype)
    return matrix
