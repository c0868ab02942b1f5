"""Normal draws as a pure function of (seed, key, position): any slice, in any order, on any worker, the same bytes.

Philox (Salmon et al., SC 2011) is counter-based: the key is a hash of (seed, key) and each block of 65536
draws has its own counter range, so a slice costs at most one block more than its length.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 16


def normal(seed: int, key: str, start: int, stop: int) -> np.ndarray:
    """Draws `start` to `stop` of the N(0, 1) stream of (seed, key), float64."""
    import numpy as np

    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    philox_key = np.frombuffer(digest[:16], dtype="<u8")
    result = np.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        counter = np.array([0, 0, block, 0], dtype=np.uint64)
        draws = np.random.Generator(np.random.Philox(key=philox_key, counter=counter)).standard_normal(BLOCK)
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        result[first - start : last - start] = draws[first - block * BLOCK : last - block * BLOCK]
    return result
