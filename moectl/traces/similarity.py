"""How alike are experts by their weights? Cosines between their matrices, or between a router's rows.

Legend: E experts, X numbers of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Read = Callable[[int], np.ndarray]
"""From the number of an expert to its weights, of any shape, the same for all."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosines between every two experts; 0 where one of them is all zeros.

    Attributes:
        cosine_EE: of the weights.
        centred_EE: of the weights less their mean over experts: copies of one dense layer are alike in all that they
            have in common, and this is the rest. Of E unrelated experts it is -1 / (E - 1) on average.
        spread: the standard deviation of the cosine between independent random weights, 1 / sqrt(X).
    """

    cosine_EE: np.ndarray
    centred_EE: np.ndarray
    spread: float


def similarity(read: Read, num_experts: int, held: int = 8) -> Similarity:
    """Cosines between the experts' weights.

    Args:
        read: called with each expert's number, and with the later ones again for every `held` experts.
        num_experts: at least one.
        held: how many experts are in memory at a time, beside their mean and the one they are compared with.
    """
    sum_X = _flat(read(0)).astype(np.float64)
    for expert in range(1, num_experts):
        sum_X += _flat(read(expert))
    mean_X = (sum_X / num_experts).astype(np.float32)
    # The mean goes first: what copies of one dense layer differ in would drown in the rounding of what they share.
    centred_EE = np.zeros((num_experts, num_experts))
    along_E = np.zeros(num_experts)
    for start in range(0, num_experts, held):
        stop = min(start + held, num_experts)
        held_HX = np.stack([_flat(read(expert)) - mean_X for expert in range(start, stop)])
        along_E[start:stop] = held_HX @ mean_X
        centred_EE[start:stop, start:stop] = held_HX @ held_HX.T
        for expert in range(stop, num_experts):
            centred_EE[start:stop, expert] = centred_EE[expert, start:stop] = held_HX @ (_flat(read(expert)) - mean_X)
    gram_EE = centred_EE + along_E[:, None] + along_E + mean_X @ mean_X
    size_E = np.diag(gram_EE)
    return Similarity(_cosines(gram_EE, size_E), _cosines(centred_EE, size_E), 1 / math.sqrt(len(mean_X)))


def rows_similarity(router_EX: np.ndarray) -> Similarity:
    """Cosines between the rows of a router's weight."""
    return similarity(lambda expert: router_EX[expert], len(router_EX))


def _flat(weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights, np.float32).reshape(-1)


def _cosines(gram_EE: np.ndarray, size_E: np.ndarray) -> np.ndarray:
    """From inner products; `size_E` are squares of which a millionth of the length is rounding, and counts as zero."""
    square_E = np.diag(gram_EE)
    real_E = (square_E > 1e-12 * size_E) & (square_E > 0)
    length_E = np.sqrt(np.where(real_E, square_E, 1.0))
    cosine_EE = np.where(real_E[:, None] & real_E, gram_EE / np.outer(length_E, length_E), 0.0)
    return np.clip(cosine_EE, -1, 1)
