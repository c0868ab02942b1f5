"""Percentile intervals by resampling documents (Efron & Tibshirani 1993, chapter 13), paired across models.

Documents, not tokens, are the units: tokens of one document rise and fall together. Legend: D documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK_NUMBERS = 1 << 22

Interval = tuple[float, float]


def resampled_sums(values_MD: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Sums over documents drawn with replacement, [R, M] for M quantities that are measured on the same D documents.

    All quantities see the same draws, so a difference between two of them is a paired one.
    """
    generator = np.random.default_rng(seed)
    return np.concatenate([counts_RD @ values_MD.T for counts_RD in _draws(generator, values_MD.shape[1], resamples)])


def interval(resampled_R: np.ndarray, level: float = LEVEL) -> Interval:
    """The middle `level` of resampled statistics."""
    tail = 50 * (1 - level)
    low, high = np.percentile(resampled_R, [tail, 100 - tail])
    return float(low), float(high)


def _draws(generator: np.random.Generator, documents: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each document is in each resample, float64 [R, D] a few million numbers at a time."""
    step = max(1, _CHUNK_NUMBERS // documents)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        yield generator.multinomial(documents, np.full(documents, 1 / documents), size=size).astype(np.float64)
