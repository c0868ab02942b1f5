"""Matrices of -1, 0 and 1 to codewords and back, row by row, with any table.

R rows, N weights in each. A row is cut greedily into the longest phrases of the table; the last one may reach beyond
the end of the row, but only with zeros. Rows know nothing of one another, so any of them can be decoded alone.
"""

from __future__ import annotations

import numpy as np

from moectl.codecs.entries import CODES, SLOTS, UNUSED
from moectl.codecs.tables import Table
from moectl.compiled import compiled

MAX_COUNT = (1 << 16) - 1
"""Codewords in a row: as many as an unsigned 16-bit number counts."""


def encode(trit_RN: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The codewords of all rows, uint16, one row after another, and how many each row has, uint16 [R].

    Raises:
        ValueError: a weight is not -1, 0 or 1, or a row has more codewords than can be counted.
    """
    rows, width = trit_RN.shape
    trit_RN = np.ascontiguousarray(trit_RN, np.int8) if trit_RN.dtype.kind in "iu" else trit_RN
    if trit_RN.dtype != np.int8 or trit_RN.min(initial=0) < -1 or trit_RN.max(initial=0) > 1:
        raise ValueError("ternary weights are integers, -1, 0 or 1")
    shortest = table.lengths[table.lengths > 0].min()
    code = np.empty(rows * (width // shortest + 1), np.uint16)
    count_R = np.empty(rows, np.int64)
    used = _encode(trit_RN, table.children, table.root, code, count_R)
    if count_R.max(initial=0) > MAX_COUNT:
        raise ValueError(f"a row of {width} weights takes {count_R.max()} codewords, and {MAX_COUNT} can be counted")
    return code[:used].copy(), count_R.astype(np.uint16)


def decode(code: np.ndarray, count_R: np.ndarray, table: Table, value_R2: np.ndarray, width: int) -> np.ndarray:
    """The matrix of codewords, [R, width], 0 where a weight is zero.

    Args:
        code: uint16, as `encode` gives them.
        count_R: uint16 [R].
        table: what they were encoded with.
        value_R2: what stands in each row for - and for +; any type of 1, 2, 4 or 8 bytes.
        width: weights in a row.

    Raises:
        ValueError: they are no rows of this width: the first row that is wrong is named. Nothing outside the arrays is
            read or written.
    """
    start_R = _starts(code, count_R, table, width)
    bits = np.dtype(f"u{value_R2.dtype.itemsize}")
    value_RN = np.zeros((len(count_R), width), bits)
    wrong = _decode(code, start_R, count_R, table.entries, np.ascontiguousarray(value_R2).view(bits), value_RN)
    if wrong >= 0:
        raise ValueError(f"the codewords of row {wrong} are not those of {width} weights")
    return value_RN.view(value_R2.dtype)


def check(code: np.ndarray, count_R: np.ndarray, table: Table, width: int) -> None:
    """Make sure that `decode` would give a matrix, without decoding it.

    Raises:
        ValueError: as `decode` raises it.
    """
    wrong = _check(code, _starts(code, count_R, table, width), count_R, table.entries, width)
    if wrong >= 0:
        raise ValueError(f"the codewords of row {wrong} are not those of {width} weights")


def _starts(code: np.ndarray, count_R: np.ndarray, table: Table, width: int) -> np.ndarray:
    """The first codeword of each row, int64 [R]."""
    if count_R.sum(dtype=np.int64) != len(code):
        raise ValueError(f"its rows count {count_R.sum(dtype=np.int64)} codewords, and it has {len(code)}")
    short = np.flatnonzero(count_R * np.int64(table.lengths.max()) < width)
    if len(short):  # before memory is taken for a width that the codewords cannot fill
        raise ValueError(f"the codewords of row {short[0]} end before its {width} weights do")
    start_R: np.ndarray = np.cumsum(count_R, dtype=np.int64) - count_R
    return start_R


@compiled
def _encode(trit_RN: np.ndarray, children: np.ndarray, root: int, code: np.ndarray, count_R: np.ndarray) -> int:
    """Fill `code` and `count_R`; how many codewords there are."""
    used = 0
    rows, width = trit_RN.shape
    for row in range(rows):
        first, start = used, 0
        while start < width:
            node, at = root, start
            phrase, end = root, start
            while at < width:
                after = children[node, trit_RN[row, at] & 3]
                if after < 0:
                    break
                node = after
                at += 1
                if node < CODES:
                    phrase, end = node, at
            if at == width and end < width:
                phrase, end = node, width
                while phrase >= CODES:
                    phrase = children[phrase, 0]
            code[used] = phrase
            used += 1
            start = end
        count_R[row] = used - first
    return used


@compiled
def _decode(
    code: np.ndarray,
    start_R: np.ndarray,
    count_R: np.ndarray,
    entries: np.ndarray,
    value_R2: np.ndarray,
    value_RN: np.ndarray,
) -> int:
    """Write what is not zero into `value_RN`; the first row whose codewords do not fit it, or -1."""
    rows, width = value_RN.shape
    for row in range(rows):
        start = 0
        for entry in entries[code[start_R[row] : start_R[row] + count_R[row]]]:
            if start >= width or entry == 0:
                return row
            for slot in range(SLOTS):
                offset = entry >> 8 * slot + 8 & 255
                if offset == UNUSED:
                    break
                column = start + offset
                if column >= width:
                    return row
                value_RN[row, column] = value_R2[row, entry >> slot + 56 & 1]
            start += entry & 255
        if start < width:
            return row
    return -1


@compiled
def _check(code: np.ndarray, start_R: np.ndarray, count_R: np.ndarray, entries: np.ndarray, width: int) -> int:
    """The first row that `_decode` would refuse, or -1."""
    for row in range(len(count_R)):
        start = 0
        for entry in entries[code[start_R[row] : start_R[row] + count_R[row]]]:
            if start >= width or entry == 0:
                return row
            if start + (entry & 255) > width:
                for slot in range(SLOTS):
                    offset = entry >> 8 * slot + 8 & 255
                    if offset != UNUSED and start + offset >= width:
                        return row
            start += entry & 255
        if start < width:
            return row
    return -1
