"""Loops that numba compiles when they are first called, kept compiled where there is a place to keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call. It lets other threads run, and checks no bounds: its callers do."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written
        return njit(nogil=True)(function)
