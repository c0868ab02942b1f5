"""The k largest of every row on a CPU: one pass over a row, which keeps the best so far in order."""

from __future__ import annotations

import numpy as np
from numba import njit


def _largest(value_TE, index_TK):  # type: ignore[no-untyped-def] # numba infers
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


try:
    largest = njit(cache=True, nogil=True)(_largest)
except RuntimeError:  # neither the package's directory nor the user's cache can be written
    largest = njit(nogil=True)(_largest)
"""(value [T, E], index [T, K]): write where the K largest of each row are, the largest first, the lower number first
among equals. K is at most E, and nothing is NaN."""
