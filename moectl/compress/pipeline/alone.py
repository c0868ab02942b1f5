"""One run at a time in a folder of statistics."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moectl.errors import UsageError
from moectl.text import escape

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until this one ends, however it does; the folder is there for as long at least.

    One that is ahead removes files that another still wants. On a file system without locks nothing keeps them apart.

    Raises:
        UsageError: another run is in the folder, or has come to its end this moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _lock(descriptor) or not _is(path, descriptor):
            raise UsageError(
                f"Another process is at work in {escape(str(folder))}.",
                "Two would write the same files.",
                "Wait until it has ended, or give another -o.",
            )
        try:
            yield
        finally:
            path.unlink()
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock of a file, which the end of the process lets go of."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether a file that was opened still has its name: one may be locked only to be removed."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
