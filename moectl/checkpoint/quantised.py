"""Numbers out of quantised bytes: a code becomes a number by a table, less its zero point, times its scale.

Arithmetic is float32, as in the readers that models are run with (transformers, compressed-tensors), so that the
product is theirs bit for bit; for 16-bit scales it is exact.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of a four-bit float (OCP Microscaling formats v1.0)."""


def numbers(raw: np.ndarray, coding: str) -> np.ndarray:
    """The numbers that stored elements stand for, in order along the last axis: float32.

    `float8` is one number per element, of the element's own type. `int4` and `int8` are packed in int32, the first in
    the lowest bits, each stored plus 2^(bits - 1) (which is left in: see `offset`). `mxfp4` [..., G, 16] is two
    numbers per byte, the first in the lower half, and becomes [..., 32 G].
    """
    octets = raw.view(np.uint8)
    if coding == "float8":
        return np.take(_float8_table(raw.dtype), octets)
    if coding == "int8":
        return octets.astype(np.float32)
    if coding == "int4":
        return _pairs(octets, coding).reshape(*octets.shape[:-1], -1)
    assert coding == "mxfp4", coding
    return _pairs(octets, coding).reshape(*octets.shape[:-2], -1)


def offset(coding: str) -> float:
    """What is added to every number before it is stored."""
    return {"int4": 8.0, "int8": 128.0}.get(coding, 0.0)


def numbers_of_columns(raw: np.ndarray, coding: str) -> np.ndarray:
    """Like `numbers` for int32 packed along the first axis: [M, G] becomes [M * (numbers per int32), G]."""
    rows, columns = raw.shape
    return numbers(raw, coding).reshape(rows, columns, -1).transpose(0, 2, 1).reshape(-1, columns)


def scale_factors(raw: np.ndarray) -> np.ndarray:
    """Scales as float32; bytes are exponents of two plus 127 (E8M0), 255 is NaN."""
    if raw.dtype == np.uint8:
        raw = raw.view(ml_dtypes.float8_e8m0fnu)
    return raw.astype(np.float32)


@cache
def _float8_table(dtype: np.dtype) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _pairs(octets: np.ndarray, coding: str) -> np.ndarray:
    """Two numbers per byte, moved as one item of eight bytes: half again as fast as indexing rows of two."""
    return np.take(_pair_table(coding).view(np.float64)[:, 0], octets).view(np.float32)


@cache
def _pair_table(coding: str) -> np.ndarray:
    """[256, 2]: the numbers of a byte's lower and upper half."""
    single = np.array(E2M1 if coding == "mxfp4" else range(16), np.float32)
    octets = np.arange(256)
    return np.stack([single[octets & 15], single[octets >> 4]], axis=1)
