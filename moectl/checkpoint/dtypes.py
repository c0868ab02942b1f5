"""The element types of the safetensors format and what they are in numpy.

Only whole-byte types are listed: sub-byte ones (F4, F6) appear in no source this project reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types a plan can compute with; weights of anything else can only be copied, or dequantised with their scales."""

TORCH_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""`dtype` as a config.json spells it -> the safetensors name."""


def numpy_dtype(name: str) -> np.dtype:
    """The numpy (or ml_dtypes) type of a safetensors type name.

    Raises:
        KeyError: the type has no numpy counterpart.
    """
    import ml_dtypes
    import numpy as np

    special = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }
    plain = {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "U16": "u2",
        "I16": "i2",
        "U32": "u4",
        "I32": "i4",
        "U64": "u8",
        "I64": "i8",
        "F16": "f2",
        "F32": "f4",
        "F64": "f8",
        "C64": "c8",
    }
    if name in special:
        return np.dtype(special[name])
    return np.dtype(plain[name]).newbyteorder("<")
