"""The one executor of plans: headers first, shards front to back, published by one rename.

Bytes that are bytes of a source move inside the kernel; computed tensors pass through memory in chunks, and move
inside the kernel too where the shard has an equal one already. The output is absent until it is complete; what is
unfinished lies in OUT.partial and the same command resumes it. Several workers, each with its share of the shards,
need only share a disk; the last one publishes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moectl.checkpoint.expressions import Expression, Extent, extents
from moectl.checkpoint.fs import FileSystem, Flusher, free_bytes
from moectl.checkpoint.hashing import Examined, Hasher
from moectl.checkpoint.journal import Journal, contents, partial_of
from moectl.checkpoint.nonfinite import by_source_tensor, nonfinite_error, search
from moectl.checkpoint.plan import OutputTensor, Plan, Shard
from moectl.checkpoint.provenance import fingerprint_of, read_provenance
from moectl.checkpoint.publish import (
    Race,
    Written,
    check_apart,
    clear,
    disk_errors,
    exists_error,
    identity,
    is_occupied,
    overtaken,
    publish,
)
from moectl.checkpoint.workers import Worker
from moectl.errors import InputError, MachineError, UsageError
from moectl.text import escape


def write(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    worker: Worker | None = None,
    allow_nonfinite: bool = False,
    command: str | None = None,
    fs: FileSystem | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Written:
    """Carry out `plan` into the directory `out`, or `worker`'s share of it; `on_bytes` hears of progress.

    A finished output of this very plan (same recipe, same weights) is read, left as it is and counts as done; a worker
    reads its share. A worker publishes when it finds that every other share is there. `allow_nonfinite` copies NaN and
    infinity too. `command` is what writes the whole plan, for the messages of `finish`.

    Raises:
        UsageError: `out` exists, or is or holds a source, or its partial output belongs to another plan.
        MachineError: the disk is too small or fails; what was done is kept.
        InputError: a source cannot be read, holds NaN or infinity, or changes meanwhile.
    """
    fs = fs or FileSystem()
    out = Path(os.path.normpath(out.absolute()))
    check_target(plan, out, overwrite=overwrite, worker=worker)
    journal = Journal(plan, out, fs, command)
    shards = plan.shards if worker is None else worker.share(plan.shards)
    with Hasher() as hasher, disk_errors(plan, out):
        if is_occupied(out) and not overwrite:
            if not _is_done(plan, shards, out, hasher, on_bytes):
                raise exists_error(out)
            clear(fs, journal.root)
            return Written(out, 0)
        with overtaken(journal, identity(out) if is_occupied(out) else None) as race:
            return _Writer(plan, journal, fs, hasher, allow_nonfinite, on_bytes).run(shards, overwrite, race)
        return Written(out, 0)


def check_target(plan: Plan, out: Path, *, overwrite: bool = False, worker: Worker | None = None) -> None:
    """Refuse what can be refused at once: an output that overlaps a source, or that is another plan's.

    Raises:
        UsageError: `out` is, holds or lies in a source, or exists and was not made by this plan.
    """
    if overwrite and worker:
        raise UsageError(
            "--overwrite and --worker do not go together.",
            "A worker could not tell the old output from the one that another worker has just published.",
            f"Remove {escape(str(out))} and {escape(str(partial_of(out)))} first, then start the workers.",
        )
    for source in plan.sources:
        check_apart(out, source.path)
    if is_occupied(out) and not overwrite and fingerprint_of(out) != plan.fingerprint:
        raise exists_error(out)


def _is_done(plan: Plan, shards: tuple[Shard, ...], out: Path, hasher: Hasher, on_bytes: Callable[[int], None]) -> bool:
    """Whether these shards of `out` are what the plan makes of its sources, and still what was written."""
    if fingerprint_of(out) != plan.fingerprint:
        return False
    recorded = read_provenance(out)["tensors"]
    known: dict[tuple[Expression, str], str] = {}
    for shard in shards:
        found = contents(out / shard.name, shard, hasher)
        if found is None:
            return False
        for tensor in shard.tensors:
            same = tensor.expression, tensor.dtype
            if same not in known:
                known[same] = _planned_hash(plan, tensor, hasher)
            if not known[same] == found[tensor.name].sha256 == recorded.get(tensor.name):
                return False
            on_bytes(tensor.nbytes)
    return True


def _planned_hash(plan: Plan, tensor: OutputTensor, hasher: Hasher) -> str:
    ranges = extents(tensor.expression, plan.sources, tensor.dtype)
    if ranges is not None:
        return hasher.submit(ranges, tensor.dtype).result().sha256
    digest = hashlib.sha256()
    for chunk in _computed(plan, tensor, hasher):
        digest.update(chunk)
    return digest.hexdigest()


def _computed(plan: Plan, tensor: OutputTensor, hasher: Hasher) -> Iterator[bytes]:
    from moectl.checkpoint.evaluate import evaluate

    try:
        yield from evaluate(tensor, plan.sources, plan.seed, plan.make)
    except InputError:
        counts = search(plan, tensor, hasher)
        if counts:
            raise nonfinite_error(counts, computed=True) from None
        raise


@dataclass(frozen=True)
class _Writer:
    plan: Plan
    journal: Journal
    fs: FileSystem
    hasher: Hasher
    allow_nonfinite: bool
    on_bytes: Callable[[int], None]

    def run(self, shards: tuple[Shard, ...], overwrite: bool, race: Race) -> Written:
        plan, journal, out = self.plan, self.journal, self.journal.out
        self._check_disk()
        journal.begin(discard_others=overwrite)
        written = 0
        if not race.is_published():
            hashes: dict[str, str] = {}
            for shard in shards:
                done = self._resume(shard)
                if done is None:
                    done = self._write_shard(shard)
                    written += 1
                hashes |= done
            others = {shard.name: journal.recorded(shard) for shard in plan.shards if shard not in shards}
            missing = tuple(name for name, record in others.items() if record is None)
            if missing and not race.is_published():
                return Written(out, written, missing)
            if not missing:
                for record in others.values():
                    hashes |= record or {}
                publish(journal, hashes, overwrite=overwrite)
        clear(self.fs, journal.root)
        return Written(out, written)

    def _check_disk(self) -> None:
        present = 0
        for directory in (self.journal.checkpoint, self.journal.root / "work"):
            present += sum(size for path in directory.glob("*") if (size := _size(path)))
        needed, free = self.plan.file_bytes - present, free_bytes(self.journal.out)
        if needed > free:
            raise MachineError(
                f"{escape(str(self.journal.out))} needs {needed} bytes, but only {free} are free there.",
                "Nothing was written.",
                "Make room, or choose an -o on another disk.",
            )

    def _resume(self, shard: Shard) -> dict[str, str] | None:
        """The hashes of a shard that an earlier run finished, if one did."""
        done = self.journal.finished(shard, self.hasher)
        if done is None:
            return None
        bad = {name: sum(examined.nonfinite) for name, examined in done.items() if any(examined.nonfinite)}
        if bad and not self.allow_nonfinite:
            raise nonfinite_error(bad)
        self.on_bytes(shard.nbytes)
        return {name: examined.sha256 for name, examined in done.items()}

    def _write_shard(self, shard: Shard) -> dict[str, str]:
        ranges = {t.name: extents(t.expression, self.plan.sources, t.dtype) for t in shard.tensors}
        examined = {
            tensor.name: self.hasher.submit(parts, tensor.dtype)
            for tensor in shard.tensors
            if (parts := ranges[tensor.name]) is not None
        }
        hashes: dict[str, str] = {}
        # Experts that start equal are computed once a shard: 1.1 GB of eight, out of fp8, in 1.8 s and not in 6.6 s.
        computed: dict[tuple[Expression, str], tuple[Extent, str]] = {}
        work = self.journal.work_file(shard.name)
        opened: dict[Path, int] = {}
        target = self.fs.create(work)
        flusher = Flusher(self.fs, target)
        try:
            self.fs.write(target, shard.header)
            position = len(shard.header)
            for tensor in shard.tensors:
                parts, same = ranges[tensor.name], (tensor.expression, tensor.dtype)
                if parts is not None:
                    self._write_copied(parts, target, opened)
                elif same in computed:
                    place, hashes[tensor.name] = computed[same]
                    self._write_copied((place,), target, opened)
                else:
                    hashes[tensor.name] = self._write_computed(tensor, target)
                    computed[same] = Extent(work, position, tensor.nbytes), hashes[tensor.name]
                position += tensor.nbytes
                flusher.wrote(tensor.nbytes)
            flusher.finish()
            copied = {name: future.result() for name, future in examined.items()}
            self._check_finite({name: ranges[name] or () for name in copied}, copied)
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
        hashes |= {name: found.sha256 for name, found in copied.items()}
        self.journal.finish(shard, hashes)
        return hashes

    def _check_finite(self, ranges: dict[str, tuple[Extent, ...]], copied: dict[str, Examined]) -> None:
        if self.allow_nonfinite or not any(any(found.nonfinite) for found in copied.values()):
            return
        counts: dict[Extent, int] = {}
        for name, found in copied.items():
            counts |= zip(ranges[name], found.nonfinite, strict=True)
        raise nonfinite_error(by_source_tensor(self.plan, counts))

    def _write_copied(self, parts: tuple[Extent, ...], target: int, opened: dict[Path, int]) -> None:
        for part in parts:
            if part.file not in opened:
                opened[part.file] = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
            self.fs.copy(opened[part.file], part.file, part.offset, part.nbytes, target)
            self.on_bytes(part.nbytes)

    def _write_computed(self, tensor: OutputTensor, target: int) -> str:
        digest = hashlib.sha256()
        for chunk in _computed(self.plan, tensor, self.hasher):
            digest.update(chunk)
            self.fs.write(target, chunk)
            self.on_bytes(len(chunk))
        return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
