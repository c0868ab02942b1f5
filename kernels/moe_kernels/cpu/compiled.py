"""Loops that numba compiles, and the threads that share them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call and kept where there is a place to keep it. It lets other threads run."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written
        return njit(nogil=True)(function)


def share(work: Callable[..., None], given: tuple[Any, ...], count: int, threads: float) -> None:
    """`work(*given, first, last)` for all of `count`, by as many threads as torch may use, and not more than `threads`.

    Plain threads: numba's own (prange) die when two threads of a program call them at once, or after a fork.
    """
    if threads < 2 or (parts := int(min(torch.get_num_threads(), threads))) == 1:
        work(*given, 0, count)
        return
    with ThreadPoolExecutor(parts) as pool:
        bounds = pairwise(count * part // parts for part in range(parts + 1))
        list(pool.map(lambda part: work(*given, *part), bounds))
