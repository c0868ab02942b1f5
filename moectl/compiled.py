"""Loops that numba compiles when they are first called, kept compiled where there is a place to keep them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call. It lets other threads run, and checks no bounds: its callers do.

    numba and its compiler are 120 MB: they are in memory only where a loop runs. So compiled loops cannot call others.
    """

    @cache
    def ready() -> Callable[..., Any]:
        from numba import njit

        try:
            return njit(cache=True, nogil=True)(function)
        except RuntimeError:  # neither the package's directory nor the user's cache can be written
            return njit(nogil=True)(function)

    @wraps(function)
    def run(*arguments: Any) -> Any:
        return ready()(*arguments)

    return run
