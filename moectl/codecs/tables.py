"""The codes to choose from: for each a table of 65,536 phrases, and the tree to find them with.

Codewords have 16 bits and stand for different numbers of weights. A file holds the number of its table alone: the
ratio of a Tunstall tree, or `QMOE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log

import numpy as np

from moectl.codecs import qmoe, tunstall

QMOE = 0
"""The dictionary of the paper, with its own numbering."""

RATIOS = (3, 5, 8, 12, 20, 34, 60, 110, 200)
"""The trees to choose from. For 50 to 99 % zeros the chosen one costs at most 0.7 % more than the best there is."""


@dataclass(frozen=True, slots=True)
class Table:
    """A code.

    Attributes:
        number: the ratio of its tree, or `QMOE`.
        entries: int64 [65536], the phrase of each codeword as `moectl.codecs.entries` packs it.
        children: int32 [nodes, 4]: the node after a weight, in column 0 for a zero, 1 for +, 3 for - (`weight & 3`);
            -1 where no phrase goes on so. Nodes 0 to 65535 are whole phrases, numbered by codeword. From every other
            node zeros lead to one of these.
        root: the node of the string without weights.
    """

    number: int
    entries: np.ndarray
    children: np.ndarray
    root: int

    @property
    def name(self) -> str:
        """What people read."""
        return "qmoe" if self.number == QMOE else f"tunstall-{self.number}"

    @property
    def lengths(self) -> np.ndarray:
        """How many weights each codeword stands for, int64 [65536]; 0 where it is not used."""
        return self.entries & 255


@lru_cache(maxsize=len(RATIOS) + 1)
def table(number: int) -> Table:
    """The table of a number; building one takes a tenth of a second, once.

    Raises:
        ValueError: there is no such table.
    """
    if not 0 <= number <= tunstall.MAX_RATIO:
        raise ValueError(f"there is no code table {number}")
    return Table(number, *(qmoe.dictionary() if number == QMOE else tunstall.tree(number)))


def choose(zero_share: float) -> int:
    """The number of the table for a share of zeros, 0 to 1."""
    if not 0 < zero_share < 1:
        return RATIOS[-1] if zero_share else RATIOS[0]
    ratio = log((1 - zero_share) / 2) / log(zero_share)
    return min(RATIOS, key=lambda listed: abs(log(listed / ratio)))
