"""Random draws as a pure function of (seed, key, position): any slice, in any order, on any worker, the same bytes.

Philox (Salmon et al., SC 2011) is counter-based: the key is a hash of (seed, key) and each block of 65536
draws has its own counter range, so a slice costs at most one block more than its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 16


def normal(seed: int, key: str, start: int, stop: int) -> np.ndarray:
    """Draws `start` to `stop` of the N(0, 1) stream of (seed, key), float64."""
    return _stream(seed, key, start, stop, lambda generator: generator.standard_normal(BLOCK))


def uniform(seed: int, key: str, start: int, stop: int) -> np.ndarray:
    """Draws `start` to `stop` of the stream of (seed, key) that is uniform on [0, 1), float64."""
    return _stream(seed, key, start, stop, lambda generator: generator.random(BLOCK))


def permutation(seed: int, key: str, size: int) -> np.ndarray:
    """A random order of 0 to size - 1, fixed by (seed, key), int64."""
    return _generator(seed, key, 0).permutation(size)


def _stream(
    seed: int, key: str, start: int, stop: int, draw: Callable[[np.random.Generator], np.ndarray]
) -> np.ndarray:
    import numpy as np

    result = np.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        draws = draw(_generator(seed, key, block))
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        result[first - start : last - start] = draws[first - block * BLOCK : last - block * BLOCK]
    return result


def _generator(seed: int, key: str, block: int) -> np.random.Generator:
    import numpy as np

    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    counter = np.array([0, 0, block, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"), counter=counter))
