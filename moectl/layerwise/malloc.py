"""Memory that is freed goes back to the system."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 25


def keep_little() -> None:
    """Have glibc give back blocks of 32 MiB and more as they are freed, and others at the end of its heap.

    By default it comes to keep up to 64 MiB there. Giving back smaller blocks one by one would cost a third more time,
    for their pages are cleared whenever they are taken again (measured at 8 experts of 512 x 512). See `man 3 mallopt`.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Have glibc give back all whole pages that are free, wherever they lie. See `man 3 malloc_trim`."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc; another malloc has none, and needs none."""
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError, TypeError):
        return
