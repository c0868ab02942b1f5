"""What a coded matrix that was read must be, and what is said where it is not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moectl.errors import InputError
from moectl.text import escape

VERSION = 1
"""Of the layouts of docs/format-qmoe.md."""

TRANSPOSED = 1
"""The flag of a parameter that is the transpose of each coded matrix."""

FLOATS = ("bfloat16", "float16", "float32")
"""Types that weights, levels and scales may have."""


def part(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The tensor of a name.

    Raises:
        InputError: there is none.
    """
    require(name in tensors, name, "the tensor is missing")
    return tensors[name]


def about(tensors: Mapping[str, np.ndarray], name: str, numbers: int) -> list[int]:
    """What NAME.about says after the version: `numbers` less one, the last of them flags.

    Raises:
        InputError: it is of another type, length or version, or has unknown flags.
    """
    tensor, called = part(tensors, f"{name}.about"), f"{name}.about"
    require(tensor.dtype == np.int32 and tensor.shape == (numbers,), called, f"it is no int32 [{numbers}]")
    version, *rest = tensor.tolist()
    if version != VERSION:
        raise InputError(
            f"{escape(called)}: the layout of this matrix has version {version}.",
            f"This moectl reads version {VERSION}.",
            "Read it with the version of moectl that wrote it, or a newer one.",
        )
    require(rest[-1] in (0, TRANSPOSED), called, f"its flags are {rest[-1]}")
    return rest


def require(holds: bool, tensor: str, what: str) -> None:
    """Refuse a tensor that is not as it has to be.

    Raises:
        InputError: it does not hold.
    """
    if not holds:
        raise damaged(tensor, what)


def damaged(tensor: str, what: str) -> InputError:
    """The error about a tensor."""
    return InputError(
        f"{escape(tensor)}: {what}.",
        "The coded matrix is damaged or was written by another program.",
        "Compress the model again, or fetch the files again.",
    )
