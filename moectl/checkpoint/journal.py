"""What an unfinished output remembers: whose plan it is, and which shards are done with which hashes.

    OUT.partial/
      journal/plan.json          the whole plan, the state of its source files, where they are, the command
      journal/<shard>.json       one record per finished shard, made after the shard is safe on disk
      work/                      files being written, named after their process
      checkpoint/                finished files; renamed to OUT at the end

One record per file, each renamed into place, so that processes sharing a disk need no lock. The name plan.json is
taken by the first process and never replaced; a record says of which plan and sources it is, for a removal of
another plan's partial output that was interrupted may leave shards and records without their plan.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.hashing import Examined, Hasher
from moectl.checkpoint.plan import Plan, Shard
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.text import escape

_FILE = "file:"


def partial_of(out: Path) -> Path:
    """OUT.partial, beside OUT so that the last rename stays on one file system."""
    return out.with_name(out.name + ".partial")


def check_recipe(out: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse, for work that comes before there is a plan, an unfinished output that another recipe began.

    Raises:
        UsageError: there is one.
    """
    root = partial_of(Path(os.path.normpath(out.absolute())))
    begun = _read(root / "journal" / "plan.json")
    if begun is not None and begun.get("plan", {}).get("recipe") != json.loads(json.dumps(recipe)):
        raise _of_another(root)


@dataclass(frozen=True)
class Journal:
    """The journal of the plan's partial output beside `out`; `command` is what began it, for messages."""

    plan: Plan
    out: Path
    fs: FileSystem
    command: str | None = None

    @staticmethod
    def reopen(out: Path, fs: FileSystem) -> Journal:
        """The journal that lies beside `out`, with its plan over its sources opened again.

        Raises:
            InputError: there is none, or its sources are gone or changed, or another version of moectl began it.
        """
        path = partial_of(out) / "journal" / "plan.json"
        begun = _read(path)
        if begun is None or "plan" not in begun:
            raise InputError(
                f"{escape(str(path))} does not exist or holds no plan.",
                "There is no unfinished output to finish.",
                "Give the -o of the command that began it, without .partial.",
            )
        sources = [_reopened(origin) for origin in begun["origins"]]
        plan = replace(Plan.from_json(begun["plan"], sources), facts=begun["facts"])
        journal = Journal(plan, out, fs, begun["command"])
        journal._check(begun)
        return journal

    @property
    def root(self) -> Path:
        """Everything unfinished."""
        return partial_of(self.out)

    @property
    def checkpoint(self) -> Path:
        """Where finished files wait."""
        return self.root / "checkpoint"

    def begin(self, *, discard_others: bool = False) -> None:
        """Start a partial output, or take up one of the same plan; `discard_others` removes any other one.

        Raises:
            UsageError: the partial output belongs to another plan.
            InputError: the sources changed since it was begun.
        """
        begun = _read(self._record("plan"))
        if discard_others and begun is not None and not self._is_state(begun):
            self.fs.remove_tree(self.root)
            begun = None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        directories = (self.root, self._record("plan").parent, self.root / "work", self.checkpoint)
        if not all(directory.is_dir() for directory in directories):
            for directory in directories:
                self.fs.make_directory(directory)
            self.fs.sync_directory(self.root)
            self.fs.sync_directory(self.out.parent)
        if begun is None:
            begun = self._take_name()
        self._check(begun)
        self._sweep()

    def finished(self, shard: Shard, hasher: Hasher) -> dict[str, Examined] | None:
        """What is in the tensors of a shard that is done and still intact, else None."""
        record = self.recorded(shard)
        if record is None:
            return None
        found = contents(self.checkpoint / shard.name, shard, hasher)
        return found if found and {name: each.sha256 for name, each in found.items()} == record else None

    def recorded(self, shard: Shard) -> dict[str, str] | None:
        """The tensor hashes that were recorded for a shard of the right size, read not from it but from its record."""
        record = _read(self._record(shard.name))
        path = self.checkpoint / shard.name
        try:
            if record is None or record.get("of") != self._token or path.stat().st_size != shard.nbytes:
                return None
        except FileNotFoundError:
            return None
        hashes: dict[str, str] = record["tensors"]
        return hashes

    def finish(self, shard: Shard, hashes: dict[str, str]) -> None:
        """Record a shard as done."""
        self._write(shard.name, {"of": self._token, "tensors": hashes})

    def work_file(self, name: str) -> Path:
        """A new name in work/ that says which process made it."""
        return self.root / "work" / f"{os.getpid()}@{socket.gethostname()}@{secrets.token_hex(4)}@{name}"

    @cached_property
    def _state(self) -> dict[str, Any]:
        """What decides whether finished shards may be taken over."""
        return {"fingerprint": self.plan.fingerprint, "sources": [_stats(source) for source in self.plan.sources]}

    @cached_property
    def _token(self) -> str:
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    def _is_state(self, begun: dict[str, Any]) -> bool:
        return {name: begun.get(name) for name in self._state} == self._state

    def _check(self, begun: dict[str, Any]) -> None:
        if begun.get("fingerprint") != self.plan.fingerprint:
            raise _of_another(self.root)
        if not self._is_state(begun):
            raise InputError(
                f"The source of {escape(str(self.root))} changed since it was begun.",
                "Finished shards could hold the old weights.",
                "Remove the directory, or give --overwrite, and start again.",
            )

    def _take_name(self) -> dict[str, Any]:
        document = {
            **self._state,
            "origins": [_origin(source) for source in self.plan.sources],
            "facts": dict(self.plan.facts),
            "command": self.command,
            "plan": self.plan.to_json(),
        }
        work = self.work_file("plan.json")
        _write_whole(self.fs, work, json.dumps(document).encode())
        try:
            self.fs.rename_new(work, self._record("plan"))
        except FileExistsError:
            self.fs.remove(work)
            return _read(self._record("plan")) or {}
        self.fs.sync_directory(self._record("plan").parent)
        return document

    def _sweep(self) -> None:
        for path in (self.root / "work").iterdir():
            pid, _, rest = path.name.partition("@")
            if rest.startswith(f"{socket.gethostname()}@") and pid.isdigit() and not _is_running(int(pid)):
                self.fs.remove(path)

    def _record(self, name: str) -> Path:
        return self.root / "journal" / f"{name}.json"

    def _write(self, name: str, record: dict[str, Any]) -> None:
        put(self.fs, self._record(name), json.dumps(record).encode(), self.work_file(f"{name}.json"))
        self.fs.sync_directory(self._record(name).parent)


def contents(path: Path, shard: Shard, hasher: Hasher) -> dict[str, Examined] | None:
    """What is in the tensors of a shard's file, by name; None where it is missing, or has another size or header."""
    try:
        with path.open("rb") as file:
            if file.read(len(shard.header)) != shard.header or path.stat().st_size != shard.nbytes:
                return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    position, futures = len(shard.header), {}
    for tensor in shard.tensors:
        futures[tensor.name] = hasher.submit((Extent(path, position, tensor.nbytes),), tensor.dtype)
        position += tensor.nbytes
    return {name: future.result() for name, future in futures.items()}


def _of_another(root: Path) -> UsageError:
    return UsageError(
        f"{escape(str(root))} holds the unfinished output of another command.",
        "Its shards do not belong to this one (other options, other sources or another version of moectl).",
        "Finish that one with its own command, or remove the directory, or give --overwrite.",
    )


def _stats(source: Checkpoint) -> dict[str, list[int]]:
    """Size and time of the weight files; of a Hub snapshot, which every machine caches for itself, the size alone."""
    return {name: [size] if source.commit else [size, mtime] for name, (size, mtime) in source.stats.items()}


def _origin(source: Checkpoint) -> str:
    if source.file is not None:
        return f"{_FILE}{source.file.absolute()}"
    return f"hf://{source.name}@{source.commit}" if source.commit else str(source.path.absolute())


def _reopened(origin: str) -> Checkpoint:
    if origin.startswith(_FILE):
        return Checkpoint.of_file(Path(origin.removeprefix(_FILE)))
    return Checkpoint.open(origin)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def put(fs: FileSystem, target: Path, data: bytes, work: Path) -> None:
    """Write a small file so that `target` is absent, as before, or whole."""
    _write_whole(fs, work, data)
    fs.rename(work, target)


def _write_whole(fs: FileSystem, path: Path, data: bytes) -> None:
    descriptor = fs.create(path)
    try:
        fs.write(descriptor, data)
        fs.sync(descriptor)
    finally:
        fs.close(descriptor)
