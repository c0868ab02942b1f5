"""The dictionary of QMoE (arXiv 2310.16795, section 4.2; facts from IST-DASLab/qmoe, sub1.py), with its own numbering.

Its 65,536 phrases are the likeliest strings of 1 to 14 pairs of weights where 88.5 % are zero. Every beginning of a
phrase is a phrase, so a phrase that is cut off by the next weight, or by the end of a row, has a codeword too.
"""

from __future__ import annotations

import numpy as np

from moectl.codecs.entries import CODES, EMPTY

ZERO_SHARE = 0.885
PAIRS = 14
ROW_BITS = 64
"""What a row takes besides its codewords in the paper's files: a 32-bit offset and two bfloat16 levels."""

_PAIR_DIGITS = 10
"""Strings of pairs are kept as decimal digits, pair + 1 each and 0 after the end, so numbers sort as strings do."""


def dictionary() -> tuple[np.ndarray, np.ndarray, int]:
    """The entries, children and root of the table, as `moectl.codecs.tables.Table` has them.

    Codewords are numbered by falling probability; equal ones by their pairs, where a zero, a - and a + of the first
    weight count 0, 1 and 2 and those of the second 0, 3 and 6, as the paper's heap of (-probability, pairs) orders
    them. The products are taken in its order too: which probabilities are equal depends on how they are rounded.
    """
    single = np.array([ZERO_SHARE, (1 - ZERO_SHARE) / 2, (1 - ZERO_SHARE) / 2])
    pair = np.outer(single, single).ravel()
    probability, digits = np.ones(1), np.zeros(1, np.int64)
    found = []
    for length in range(PAIRS):
        probability = np.outer(probability, pair).ravel()
        step = _PAIR_DIGITS ** (PAIRS - 1 - length)
        digits = np.add.outer(digits, np.arange(1, 10) * step).ravel()
        likely = probability > 1 / CODES**1.05  # well below the cut, 1.14e-5; a child is never likelier than its parent
        probability, digits = probability[likely], digits[likely]
        found.append((probability, digits))
    probability, digits = (np.concatenate(parts) for parts in zip(*found, strict=True))
    digits = digits[np.lexsort([digits, -probability])[:CODES]]
    pair_ND = digits[:, None] // _PAIR_DIGITS ** np.arange(PAIRS)[::-1] % _PAIR_DIGITS - 1
    return _entries(pair_ND), *_tree(digits, pair_ND)


def _entries(pair_ND: np.ndarray) -> np.ndarray:
    """The packed phrases of strings of pairs, -1 after the end of each."""
    symbol_NL = np.stack([pair_ND % 3, pair_ND // 3], -1).reshape(len(pair_ND), -1)
    symbol_NL[np.repeat(pair_ND < 0, 2, axis=1)] = 0
    entries = EMPTY + 2 * (pair_ND >= 0).sum(1)
    row, offset = np.nonzero(symbol_NL)
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    np.bitwise_xor.at(entries, row, (255 ^ offset) << 8 * slot + 8)
    np.bitwise_or.at(entries, row, (symbol_NL[row, offset] == 2).astype(np.int64) << slot + 56)
    return entries


def _tree(digits: np.ndarray, pair_ND: np.ndarray) -> tuple[np.ndarray, int]:
    """The nodes after each weight, and the root: phrases, the root, then the nodes between the weights of a pair."""
    columns = np.array([0, 3, 1])
    last = (pair_ND >= 0).sum(1) - 1
    pair = pair_ND[np.arange(CODES), last]
    prefix = digits - (pair + 1) * _PAIR_DIGITS ** (PAIRS - 1 - last)
    order = np.argsort(digits)
    parent = np.where(prefix == 0, CODES, order[np.searchsorted(digits[order], prefix) % CODES])
    first = columns[pair % 3]
    between, where = np.unique(parent * 4 + first, return_inverse=True)
    children = np.full((CODES + 1 + len(between), 4), -1, np.int32)
    children[between // 4, between % 4] = CODES + 1 + np.arange(len(between))
    children[CODES + 1 + where, columns[pair // 3]] = np.arange(CODES)
    return children, CODES
