"""What routers' references share: softmax, sigmoid and top-k in float64, expert by expert, with no code of moectl.

Legend: E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Chosen = tuple[np.ndarray, np.ndarray]
"""Index [T, K] and weight [T, K]."""

Row = Sequence[float] | np.ndarray


def best(row: Row, k: int | None = None) -> list[int]:
    """The numbers of the k largest, or of all, the largest first, the lower number first among equals."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def softmax(row: Row) -> np.ndarray:
    """Powers of e over their sum [E]; of rows in which none overflows."""
    powers = [math.exp(value) for value in row]
    total = math.fsum(powers)
    return np.array([power / total for power in powers])


def sigmoid(row: Row) -> np.ndarray:
    """1 / (1 + exp(-value)) of each [E]."""
    return np.array([1 / (1 + math.exp(-value)) for value in row])
