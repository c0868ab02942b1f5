"""How many bits ternary weights take, and how many they would have to take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.codecs.blob import Blob
from moectl.codecs.entries import SLOTS, UNUSED
from moectl.codecs.tables import QMOE, table


@dataclass(frozen=True, slots=True)
class Rate:
    """Bits of one matrix or, added up, of many.

    Attributes:
        weights: how many there are.
        entropy_bits: what no code of independent weights can undercut, at the shares of -, 0 and + of each matrix.
        code_bits: codewords.
        row_bits: what each row takes besides: its count and its levels.
    """

    weights: int = 0
    entropy_bits: float = 0.0
    code_bits: int = 0
    row_bits: int = 0

    def __add__(self, other: Rate) -> Rate:
        return Rate(
            self.weights + other.weights,
            self.entropy_bits + other.entropy_bits,
            self.code_bits + other.code_bits,
            self.row_bits + other.row_bits,
        )

    @property
    def entropy(self) -> float:
        """Bits per weight that are needed."""
        return self.entropy_bits / max(1, self.weights)

    @property
    def codes(self) -> float:
        """Bits per weight of codewords."""
        return self.code_bits / max(1, self.weights)

    @property
    def rows(self) -> float:
        """Bits per weight of counts and levels."""
        return self.row_bits / max(1, self.weights)

    @property
    def achieved(self) -> float:
        """Bits per weight of everything on disk but the few bytes per matrix."""
        return self.codes + self.rows

    @property
    def headroom(self) -> float:
        """Bits per weight that a perfect code would save, levels kept."""
        return self.codes - self.entropy


def entropy(count_3: np.ndarray) -> float:
    """Bits of so many independent symbols of each kind, all together."""
    count = count_3[count_3 > 0].astype(np.float64)
    return float(np.sum(count * np.log2(count.sum() / count)))


def measure(blob: Blob, trits: np.ndarray) -> Rate:
    """The rate of a matrix, from its blob and its weights as -1, 0 and 1."""
    plus, minus = np.count_nonzero(trits > 0), np.count_nonzero(trits < 0)
    needed = entropy(np.array([minus, trits.size - plus - minus, plus]))
    return Rate(trits.size, needed, 8 * blob.codes.nbytes, 8 * (blob.counts.nbytes + blob.levels.nbytes))


def expected(number: int, zero_share: float) -> float:
    """Bits per weight of codewords for independent weights, + as likely as -, in rows without end.

    Raises:
        ValueError: it is the number of the paper's dictionary, whose phrases are not independent of one another.
    """
    if number == QMOE:
        raise ValueError("the rate of the paper's dictionary has to be measured")
    tree = table(number)
    byte_N8 = tree.entries.astype("<i8").view(np.uint8).reshape(-1, 8)
    length, signs = tree.lengths, (byte_N8[:, 1 : 1 + SLOTS] != UNUSED).sum(1)
    used = length > 0
    zeros = (length - signs)[used]
    return float(16 / np.sum(length[used] * zero_share**zeros * ((1 - zero_share) / 2) ** signs[used]))
