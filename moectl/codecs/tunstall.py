"""Tunstall trees (B. P. Tunstall, 1967) that are made of a whole number and of integers only.

The number is the `ratio`: how many zeros are as unlikely as one weight that is not zero, p ** ratio = (1 - p) / 2 for
a share p of zeros. The tree grows by cost, where a zero costs 1 and a + or - costs the ratio. So it comes out the same
on every machine, and a file that names the ratio need not hold the tree.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from moectl.codecs.entries import CODES, EMPTY, SLOTS, UNUSED

MAX_RATIO = 255
EXPANSIONS = (CODES - 1) // 2
"""How often one leaf can become three before codewords run out. The last codeword is left over."""


def tree(ratio: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The entries, children and root of the tree, as `moectl.codecs.tables.Table` has them.

    Nodes are taken in the order of their costs; of one cost, in the order in which they came to be. As long as
    codewords are left and its phrase can grow, a node is expanded; the others get the codewords, in this order, so the
    likeliest come first. Nodes of one cost are expanded together: first their + children come to be, then their -
    children, then those by a zero.
    """
    entries, entry_count = np.zeros(CODES, np.int64), 0
    children, node_count = np.full((CODES + EXPANSIONS + 1, 4), -1, np.int32), CODES
    nowhere = len(children) - 1  # a row for the link to the root, cut off at the end
    pending = defaultdict(list, {0: [np.array([[EMPTY, 0, nowhere, 0]], np.int64)]})
    cost = 0
    while pending:
        entry, used, parent, column = np.concatenate([np.empty((0, 4), np.int64), *pending.pop(cost, [])]).T
        grows = (used < SLOTS) & (entry & 255 < UNUSED)
        grows &= np.cumsum(grows) <= CODES + EXPANSIONS - node_count
        number = np.where(grows, node_count - 1 + np.cumsum(grows), entry_count - 1 + np.cumsum(~grows))
        children[parent, column] = number
        entries[number[~grows]] = entry[~grows]
        entry_count, node_count = entry_count + int(np.sum(~grows)), node_count + int(np.sum(grows))
        if grows.any():
            entry, used, number = entry[grows], used[grows], number[grows]
            placed = (entry ^ (255 ^ entry & 255) << 8 * used + 8) + 1
            for signed, column in ((placed | 1 << used + 56, 1), (placed, 3)):
                pending[cost + ratio].append(np.stack([signed, used + 1, number, np.full_like(used, column)], 1))
            pending[cost + 1].append(np.stack([entry + 1, used, number, np.zeros_like(used)], 1))
        cost += 1
    return entries, children[:nowhere], CODES
