"""The one seam through which files are made: tests replace it to fail, to be killed, or to lose unsynced data."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moectl.checkpoint.source import changed

COPY_BYTES = 1 << 26
FLUSH_BYTES = 1 << 28
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
_NO_HARD_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}


class FileSystem:
    """The real effects. Modes follow the umask."""

    def make_directory(self, path: Path) -> None:
        """Make one directory; fine if it is there."""
        path.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file to write."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: bytes) -> None:
        """Append all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def copy(self, source: int, name: Path, offset: int, nbytes: int, target: int) -> None:
        """Append `nbytes` of `source` (opened from `name`) from `offset`, inside the kernel where it can.

        Raises:
            InputError: the source is shorter than that.
        """
        while nbytes:
            try:
                done = os.copy_file_range(source, target, min(nbytes, COPY_BYTES), offset)
            except OSError as error:
                if error.errno not in _NO_COPY_FILE_RANGE:
                    raise
                data = os.pread(source, min(nbytes, 1 << 20), offset)
                self.write(target, data)
                done = len(data)
            if not done:
                raise changed(name, f"ended {nbytes} bytes early while it was read")
            offset += done
            nbytes -= done

    def sync(self, descriptor: int) -> None:
        """Force a file's data to the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Force a directory's entries to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file (replacing one) or a directory (not replacing a full one), atomically."""
        source.rename(target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Move a file to a name that must be free, atomically, so that of several processes one succeeds.

        Raises:
            FileExistsError: the name is taken.
        """
        try:
            target.hardlink_to(source)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            source.rename(target)
        else:
            source.unlink()

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and what is in it, if it is there."""
        shutil.rmtree(path, ignore_errors=False) if path.exists() else None


def free_bytes(path: Path) -> int:
    """Free disk space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class Flusher:
    """Forces a file to the disk in the background while it is still being written.

    Copying keeps one core busy and writing back another: 3.45 GB took 3.1 s one after the other, 2.0 s at once.
    """

    def __init__(self, fs: FileSystem, descriptor: int) -> None:
        self._fs = fs
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._unsynced = 0

    def wrote(self, nbytes: int) -> None:
        """Hear that more was written."""
        self._unsynced += nbytes
        if self._unsynced >= FLUSH_BYTES and (self._running is None or self._running.done()):
            self._check()
            self._unsynced = 0
            self._running = self._pool.submit(self._fs.sync, self._descriptor)

    def finish(self) -> None:
        """Return when everything is on the disk."""
        self._check()
        self._fs.sync(self._descriptor)

    def close(self) -> None:
        """Wait for the thread to leave the descriptor alone."""
        self._pool.shutdown()

    def _check(self) -> None:
        # The kernel reports a failed write-back once: to this thread's fsync, not again to the last one.
        if self._running is not None:
            self._running.result()
