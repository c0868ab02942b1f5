"""Cases of routers that take the top of a softmax or sigmoid."""

from __future__ import annotations

import numpy as np
from case import Case, at_most_one

from moectl.routers.capacity import capacity
from moectl.routers.protocol import Context, Router


def switch(router: Router, scores_TE: np.ndarray, _context: Context) -> tuple[np.ndarray, np.ndarray]:
    T, E = scores_TE.shape
    room = -int(-1.25 * T // E)
    index, weight, taken = [], [], [0] * E
    for row in scores_TE:
        best = max(range(E), key=lambda e: (row[e], -e))
        if taken[best] < room:
            index.append([best])
            weight.append([np.exp(row[best]) / np.exp(row).sum()])
        else:
            index.append([-1])
            weight.append([0.0])
        taken[best] += 1
    return np.array(index), np.array(weight)


CASES = [
    Case("switch", switch, at_most_one, room=lambda tokens: capacity(tokens, 8, 1, 1.25)),
]
