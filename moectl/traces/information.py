"""Entropy and mutual information of counts, in nats: plug-in estimates, which see structure in noise.

So whoever uses them estimates again after shuffling, and reports both.
"""

from __future__ import annotations

import math

import numpy as np


def entropy(count_X: np.ndarray) -> float:
    """Of the distribution that counts (of any shape) are proportional to; 0 where nothing was counted."""
    total = count_X.sum()
    if total == 0:
        return 0.0
    share_X = count_X[count_X > 0] / total
    return max(0.0, float(-(share_X * np.log(share_X)).sum()))


def entropy_of(label_T: np.ndarray) -> float:
    """Of the labels of tokens."""
    return entropy(np.unique(label_T, return_counts=True)[1])


def mutual_information(count_XY: np.ndarray) -> float:
    """What the row tells of the column; 0 where nothing was counted."""
    return max(0.0, entropy(count_XY.sum(0)) + entropy(count_XY.sum(1)) - entropy(count_XY))


def beyond_chance(value: float, chance: float, most: float) -> float:
    """How far from what chance gives (0) to the most that is possible (1); 0 where nothing lies between.

    The adjustment of Vinh, Epps and Bailey (JMLR 11, 2010); a little below 0 where chance gave more.
    """
    return (value - chance) / (most - chance) if most - chance > 1e-9 * max(most, 1.0) else 0.0


def log_choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose k of n; k within 0..n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
