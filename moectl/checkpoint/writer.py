"""The one executor of plans: headers first, shards front to back, published by one rename.

Bytes that are bytes of a source move inside the kernel; computed tensors pass through memory in chunks. The
output is absent until it is complete; what is unfinished lies in OUT.partial and the same command resumes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moectl.checkpoint.expressions import Extent, extents
from moectl.checkpoint.fs import FileSystem, Flusher
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.header import escape
from moectl.checkpoint.journal import Journal, put
from moectl.checkpoint.plan import PROVENANCE, OutputTensor, Plan, Shard
from moectl.checkpoint.provenance import provenance_text, read_provenance, sha256_file
from moectl.errors import InputError, MachineError, UsageError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Written:
    """What `write` did: where the output is, and how many of its shards this run wrote."""

    path: Path
    shards_written: int


def write(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    fs: FileSystem | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Written:
    """Carry out `plan` into the directory `out`; `on_bytes` hears of progress.

    A finished output of this very plan (same recipe, same weights) is left as it is and counts as done.

    Raises:
        UsageError: `out` exists, or is or holds a source, or its partial output belongs to another plan.
        MachineError: the disk is too small or fails; what was done is kept.
        InputError: a source cannot be read or changes meanwhile.
    """
    fs = fs or FileSystem()
    out = Path(os.path.normpath(out.absolute()))
    check_target(plan, out, overwrite=overwrite)
    with Hasher() as hasher:
        if _is_occupied(out) and not overwrite:
            if not _is_done(plan, out, hasher):
                raise _exists(out)
            fs.remove_tree(Journal(plan, out, fs).root)
            return Written(out, 0)
        with _disk_errors(plan, out):
            return _Writer(plan, Journal(plan, out, fs), fs, hasher, on_bytes).run(overwrite)


def check_target(plan: Plan, out: Path, *, overwrite: bool = False) -> None:
    """Refuse what can be refused at once: an output that overlaps a source, or that is another plan's.

    Raises:
        UsageError: `out` is, holds or lies in a source, or exists and was not made by this plan.
    """
    target = Path(os.path.realpath(out))
    for source in plan.sources:
        origin = Path(os.path.realpath(source.path))
        if target == origin or target in origin.parents or origin in target.parents:
            raise UsageError(
                f"The output {escape(str(out))} and the source {escape(str(source.path))} are in one another.",
                "Sources are never written to.",
                "Choose another -o.",
            )
    if _is_occupied(out) and not overwrite and _fingerprint(out) != plan.fingerprint:
        raise _exists(out)


def free_bytes(path: Path) -> int:
    """Free disk space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _is_done(plan: Plan, out: Path, hasher: Hasher) -> bool:
    if _fingerprint(out) != plan.fingerprint:
        return False
    recorded = read_provenance(out)
    for shard in plan.shards:
        path = out / shard.name
        if not path.exists() or path.stat().st_size != shard.nbytes:
            return False
    return all(_planned_hash(plan, tensor, hasher) == recorded["tensors"][tensor.name] for tensor in plan.tensors)


def _is_occupied(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _fingerprint(out: Path) -> str | None:
    try:
        fingerprint: str | None = read_provenance(out).get("fingerprint")
    except InputError:
        return None
    return fingerprint


def _exists(out: Path) -> UsageError:
    return UsageError(
        f"{escape(str(out))} exists.",
        "It is not what this command makes of these weights.",
        "Give --overwrite to replace it, or another -o.",
    )


def _planned_hash(plan: Plan, tensor: OutputTensor, hasher: Hasher) -> str:
    ranges = extents(tensor.expression, plan.sources, tensor.dtype)
    if ranges is not None:
        return hasher.submit(ranges).result()
    digest = hashlib.sha256()
    for chunk in _computed(plan, tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _computed(plan: Plan, tensor: OutputTensor) -> Iterator[bytes]:
    from moectl.checkpoint.evaluate import evaluate

    return evaluate(tensor, plan.sources, plan.seed)


@contextmanager
def _disk_errors(plan: Plan, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise MachineError(
            f"{escape(str(error.filename or out))}: {error.strerror}.",
            f"{plan.file_bytes} bytes are to be written and {free_bytes(out)} are free; what was done is kept.",
            "Make room, then run the same command again to go on.",
        ) from error


@dataclass(frozen=True)
class _Writer:
    plan: Plan
    journal: Journal
    fs: FileSystem
    hasher: Hasher
    on_bytes: Callable[[int], None]

    def run(self, overwrite: bool) -> Written:
        plan, journal, out = self.plan, self.journal, self.journal.out
        self._check_disk()
        journal.begin(discard_others=overwrite)
        hashes: dict[str, str] = {}
        written = 0
        for shard in plan.shards:
            done = journal.finished(shard, self.hasher)
            if done is None:
                done = self._write_shard(shard)
                written += 1
            else:
                self.on_bytes(shard.nbytes)
            hashes |= done
        self._write_files(hashes)
        for source in plan.sources:
            source.check_unchanged()
        self.fs.sync_directory(journal.checkpoint)
        if overwrite and out.exists():
            self.fs.rename(out, journal.root / "replaced")
        self.fs.rename(journal.checkpoint, out)
        self.fs.sync_directory(out.parent)
        self.fs.remove_tree(journal.root)
        return Written(out, written)

    def _check_disk(self) -> None:
        present = sum(p.stat().st_size for p in self.journal.checkpoint.glob("*")) if self.journal.root.exists() else 0
        needed, free = self.plan.file_bytes - present, free_bytes(self.journal.out)
        if needed > free:
            raise MachineError(
                f"{escape(str(self.journal.out))} needs {needed} bytes, but only {free} are free there.",
                "Nothing was written.",
                "Make room, or choose an -o on another disk.",
            )

    def _write_shard(self, shard: Shard) -> dict[str, str]:
        ranges = {t.name: extents(t.expression, self.plan.sources, t.dtype) for t in shard.tensors}
        hashes = {name: self.hasher.submit(parts) for name, parts in ranges.items() if parts is not None}
        computed: dict[str, str] = {}
        work = self.journal.work_file(shard.name)
        opened: dict[Path, int] = {}
        target = self.fs.create(work)
        flusher = Flusher(self.fs, target)
        try:
            self.fs.write(target, shard.header)
            for tensor in shard.tensors:
                parts = ranges[tensor.name]
                if parts is None:
                    computed[tensor.name] = self._write_computed(tensor, target)
                else:
                    self._write_copied(parts, target, opened)
                flusher.wrote(tensor.nbytes)
            flusher.finish()
        except BaseException:
            self.fs.remove(work)
            raise
        finally:
            flusher.close()
            self.fs.close(target)
            for descriptor in opened.values():
                os.close(descriptor)
        self.fs.rename(work, self.journal.checkpoint / shard.name)
        self.fs.sync_directory(self.journal.checkpoint)
        done = computed | {name: future.result() for name, future in hashes.items()}
        self.journal.finish(shard, done)
        return done

    def _write_copied(self, parts: tuple[Extent, ...], target: int, opened: dict[Path, int]) -> None:
        for part in parts:
            if part.file not in opened:
                opened[part.file] = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
            self.fs.copy(opened[part.file], part.file, part.offset, part.nbytes, target)
            self.on_bytes(part.nbytes)

    def _write_computed(self, tensor: OutputTensor, target: int) -> str:
        digest = hashlib.sha256()
        for chunk in _computed(self.plan, tensor):
            digest.update(chunk)
            self.fs.write(target, chunk)
            self.on_bytes(len(chunk))
        return digest.hexdigest()

    def _write_files(self, tensor_hashes: dict[str, str]) -> None:
        """Side files byte for byte, generated ones, and last the provenance with everybody's hash."""
        target = self.journal.checkpoint
        generated = self.plan.text_files
        for side in self.plan.sources[0].side_files() if self.plan.sources else ():
            if side.name not in generated:
                self._put(target / side.name, side.read_bytes())
        for name, text in generated.items():
            self._put(target / name, text.encode())
        weights = {shard.name for shard in self.plan.shards} | {PROVENANCE, "README.md"}
        hashed = {p.name: sha256_file(p) for p in target.iterdir() if p.name not in weights}
        self._put(target / PROVENANCE, provenance_text(self.plan, tensor_hashes, hashed).encode())

    def _put(self, path: Path, data: bytes) -> None:
        put(self.fs, path, data, self.journal.work_file(path.name))
