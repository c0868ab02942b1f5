"""The end of a plan: the small files, and the one rename that makes OUT appear, whoever of several workers gets there.

Two processes may publish the same plan at once. Only one of them finds the finished directory to rename; the other
sees names vanish under it, looks at OUT, and finds there what it would have made.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moectl.checkpoint.fs import FileSystem, free_bytes
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.journal import Journal, partial_of, put
from moectl.checkpoint.plan import PROVENANCE, Plan
from moectl.checkpoint.provenance import fingerprint_of, provenance_text, sha256_file
from moectl.errors import InputError, MachineError, UsageError
from moectl.text import escape

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_OVERTAKEN = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Written:
    """What was done: where the output is or will be, how many shards this run wrote, which ones nobody has yet."""

    path: Path
    shards_written: int
    missing: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        """Whether the output is complete and in its place."""
        return not self.missing


def finish(
    out: Path, *, fs: FileSystem | None = None, on_plan: Callable[[Plan], Callable[[int], None]] | None = None
) -> Written:
    """Check the shards that workers left in OUT.partial, all of them by their hashes, and publish them.

    An output that is already in its place counts as done. `on_plan` hears of the plan and returns what hears of the
    bytes checked.

    Raises:
        InputError: shards are missing or damaged, the sources changed, or there is nothing to finish.
        UsageError: `out` exists and is another plan's.
        MachineError: the disk fails.
    """
    fs = fs or FileSystem()
    out = Path(os.path.normpath(out.absolute()))
    try:
        journal = Journal.reopen(out, fs)
    except InputError:
        if not (partial_of(out) / "journal" / "plan.json").exists() and fingerprint_of(out) is not None:
            return Written(out, 0)
        raise
    on_bytes = on_plan(journal.plan) if on_plan else lambda _done: None
    with disk_errors(journal.plan, out), Hasher() as hasher:
        if is_occupied(out) and fingerprint_of(out) != journal.plan.fingerprint:
            raise exists_error(out)
        with overtaken(journal, identity(out) if is_occupied(out) else None) as race:
            if is_occupied(out):
                clear(fs, journal.root)
                return Written(out, 0)
            hashes: dict[str, str] = {}
            bad = []
            for shard in journal.plan.shards:
                found = journal.finished(shard, hasher)
                if found is None:
                    bad.append(shard.name)
                else:
                    hashes |= {name: examined.sha256 for name, examined in found.items()}
                on_bytes(shard.nbytes)
            if bad and not race.is_published():
                raise _incomplete(journal, bad)
            if not bad:
                publish(journal, hashes)
        clear(fs, journal.root)
    return Written(out, 0)


def publish(journal: Journal, hashes: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Add the small files to the finished shards, check that the sources held still, and rename to OUT.

    Raises:
        InputError: a source changed.
        OSError: the disk fails, or (ENOENT, ENOTEMPTY) somebody else published first.
    """
    fs, out = journal.fs, journal.out
    _write_files(journal, hashes)
    for source in journal.plan.sources:
        source.check_unchanged()
    fs.sync_directory(journal.checkpoint)
    with _one_at_a_time(journal):
        if overwrite and out.exists() and journal.checkpoint.exists():
            fs.rename(out, journal.root / f"replaced-{secrets.token_hex(4)}")
            fs.sync_directory(journal.root)
        fs.rename(journal.checkpoint, out)
        fs.sync_directory(out.parent)


def clear(fs: FileSystem, root: Path) -> None:
    """Remove a partial output that is no longer needed, though others may still be busy in it.

    Whoever makes something anew in it while it is removed finds OUT published afterwards, and clears in turn.
    """
    for _ in range(10):
        try:
            return fs.remove_tree(root)
        except OSError as error:
            if error.errno not in _OVERTAKEN:
                raise
    return None


@dataclass(frozen=True, slots=True)
class Race:
    """How to notice that another process published this plan since we began."""

    journal: Journal
    before: tuple[int, int] | None

    def is_published(self) -> bool:
        """Whether OUT is there, is of this plan, and is not what was there before."""
        out = self.journal.out
        return fingerprint_of(out) == self.journal.plan.fingerprint and identity(out) != self.before


@contextmanager
def overtaken(journal: Journal, before: tuple[int, int] | None) -> Iterator[Race]:
    """Take it for success when names vanish because another process published; clear what we made meanwhile."""
    race = Race(journal, before)
    try:
        yield race
    except OSError as error:
        if error.errno not in _OVERTAKEN or not race.is_published():
            raise
        clear(journal.fs, journal.root)


@contextmanager
def disk_errors(plan: Plan | None, out: Path) -> Iterator[None]:
    """Say of a disk that is full or broken how much is to be written, if a plan says it, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise MachineError(
            f"{escape(str(error.filename or out))}: {error.strerror}.",
            (f"{plan.file_bytes} bytes are to be written and " if plan else "")
            + f"{free_bytes(out)} bytes are free; what was done is kept.",
            "Make room, then run the same command again to go on.",
        ) from error


def is_occupied(out: Path) -> bool:
    """Whether there is something at `out` that a rename must not replace; an empty directory is free to take."""
    try:
        return out.exists() and (not out.is_dir() or any(out.iterdir()))
    except FileNotFoundError:
        return False


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a directory from another one of the same name."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def check_apart(out: Path, source: Path) -> None:
    """Refuse an output that is, holds or lies in the directory of a source.

    Raises:
        UsageError: it does.
    """
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if target == origin or target in origin.parents or origin in target.parents:
        raise UsageError(
            f"The output {escape(str(out))} and the source {escape(str(source))} are in one another.",
            "Sources are never written to.",
            "Choose another -o.",
        )


def exists_error(out: Path) -> UsageError:
    """The error for an output that is somebody else's."""
    return UsageError(
        f"{escape(str(out))} exists.",
        "It is not what this command makes of these weights.",
        "Give --overwrite to replace it, or another -o.",
    )


def _incomplete(journal: Journal, bad: list[str]) -> InputError:
    shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    again = escape(journal.command) if journal.command else "the command that began it"
    return InputError(
        f"{escape(str(journal.root))} lacks {len(bad)} of {len(journal.plan.shards)} shards: {shown}.",
        "Their workers have not come to an end, or the files were damaged since.",
        f"Start those workers again, or write what is missing and publish with: {again}",
    )


def _write_files(journal: Journal, tensor_hashes: Mapping[str, str]) -> None:
    """Side files byte for byte, generated ones, and last the provenance with everybody's hash; nothing else stays."""
    plan, target = journal.plan, journal.checkpoint
    files = {name: text.encode() for name, text in plan.text_files.items()}
    for side in plan.sources[0].side_files() if plan.sources else ():
        files.setdefault(side.name, side.read_bytes())
    for name, data in files.items():
        put(journal.fs, target / name, data, journal.work_file(name))
    ours = {*files, PROVENANCE, *(shard.name for shard in plan.shards)}
    for path in target.iterdir():
        if path.name not in ours:
            journal.fs.remove(path)
    hashed = {name: sha256_file(target / name) for name in files if name != "README.md"}
    text = provenance_text(plan, tensor_hashes, hashed)
    put(journal.fs, target / PROVENANCE, text.encode(), journal.work_file(PROVENANCE))


@contextmanager
def _one_at_a_time(journal: Journal) -> Iterator[None]:
    """Let one process at a time exchange OUT: replacing takes two renames, and another's must not fall between."""
    descriptor = os.open(journal.root / "journal" / "plan.json", os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: then only --overwrite twice at once is unguarded
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
