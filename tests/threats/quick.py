"""Whether something is quick, told in a way that a busy machine and a worker full of other tests do not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

SECONDS = 1.0
TRIES = 3
T = TypeVar("T")


def least_cpu_seconds(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` returns, and the CPU seconds it takes this thread: the least of `TRIES`, or the first below `SECONDS`.

    What is slow is slow each time; a first import or a collection of garbage falls on one run by chance.
    """
    least = float("inf")
    for _ in range(TRIES):
        started = time.thread_time()
        result = run()
        least = min(least, time.thread_time() - started)
        if least < SECONDS:
            break
    return result, least
