"""The k largest of every row on a CPU: one pass over a row, which keeps the best so far in order."""

from __future__ import annotations

import numpy as np

from moectl.compiled import compiled


@compiled
def largest(value_TE: np.ndarray, index_TK: np.ndarray) -> None:
    """Write where the K largest of each row are, the largest first, the lower number first among equals.

    K is at most E. Where a row has a NaN, its numbers are in range and of no meaning.
    """
    rows, experts = value_TE.shape
    wanted = index_TK.shape[1]
    best = np.empty(wanted, value_TE.dtype)
    for row in range(rows):
        for expert in range(experts):
            value = value_TE[row, expert]
            if expert >= wanted and value <= best[wanted - 1]:
                continue
            place = min(expert, wanted - 1)
            while place > 0 and value > best[place - 1]:
                best[place] = best[place - 1]
                index_TK[row, place] = index_TK[row, place - 1]
                place -= 1
            best[place] = value
            index_TK[row, place] = expert
