"""sha256 of tensors, in threads beside the copying; a source range that is copied E times is hashed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.source import changed

_BUFFER_BYTES = 1 << 21


def sha256_extents(extents: Sequence[Extent]) -> str:
    """The hash of the ranges' bytes, read with pread through one small buffer.

    Raises:
        InputError: a file ends before its range does.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for extent in extents:
        descriptor = os.open(extent.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position, end = extent.offset, extent.offset + extent.nbytes
            while position < end:
                done = os.preadv(descriptor, [buffer[: min(_BUFFER_BYTES, end - position)]], position)
                if not done:
                    raise changed(extent.file, "ended while it was being hashed")
                digest.update(buffer[:done])
                position += done
        finally:
            os.close(descriptor)
    return digest.hexdigest()


class Hasher:
    """Hashes extents in the background; asking again for the same ones costs nothing."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1))
        self._known: dict[tuple[Extent, ...], Future[str]] = {}

    def submit(self, extents: tuple[Extent, ...]) -> Future[str]:
        """The hash of `extents`, perhaps not yet known."""
        if extents not in self._known:
            self._known[extents] = self._pool.submit(sha256_extents, extents)
        return self._known[extents]

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
