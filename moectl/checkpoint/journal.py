"""What an unfinished output remembers: whose plan it is, and which shards are done with which hashes.

    OUT.partial/
      journal/plan.json          the plan's fingerprint and the state of its source files
      journal/<shard>.json       one record per finished shard, made after the shard is safe on disk
      work/                      files being written, named after their process
      checkpoint/                finished files; renamed to OUT at the end

One record per file, each renamed into place, so that processes sharing a disk need no lock.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.header import escape
from moectl.checkpoint.plan import Plan, Shard
from moectl.errors import InputError, UsageError


@dataclass(frozen=True)
class Journal:
    """The journal of the plan's partial output beside `out`."""

    plan: Plan
    out: Path
    fs: FileSystem

    @property
    def root(self) -> Path:
        """OUT.partial, beside OUT so that the last rename stays on one file system."""
        return self.out.with_name(self.out.name + ".partial")

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
        state = {"fingerprint": self.plan.fingerprint, "sources": [dict(s.stats) for s in self.plan.sources]}
        state = json.loads(json.dumps(state))
        begun = self._read("plan")
        if discard_others and begun != state:
            self.fs.remove_tree(self.root)
            begun = None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for directory in (self.root, self.root / "journal", self.root / "work", self.checkpoint):
            self.fs.make_directory(directory)
        if begun is None:
            self._write("plan", state)
        elif begun["fingerprint"] != state["fingerprint"]:
            raise UsageError(
                f"{escape(str(self.root))} holds the unfinished output of another command.",
                "Its shards do not belong to this one (other options, other sources or another version of moectl).",
                "Finish that one with its own command, or remove the directory, or give --overwrite.",
            )
        elif begun["sources"] != state["sources"]:
            raise InputError(
                f"The source of {escape(str(self.root))} changed since it was begun.",
                "Finished shards could hold the old weights.",
                "Remove the directory, or give --overwrite, and start again.",
            )
        self._sweep()

    def finished(self, shard: Shard, hasher: Hasher) -> dict[str, str] | None:
        """The tensor hashes of a shard that is done and still intact, else None."""
        record = self._read(shard.name)
        path = self.checkpoint / shard.name
        if record is None or not path.exists() or path.stat().st_size != shard.nbytes:
            return None
        with path.open("rb") as file:
            if file.read(len(shard.header)) != shard.header:
                return None
        position, futures = len(shard.header), {}
        for tensor in shard.tensors:
            futures[tensor.name] = hasher.submit((Extent(path, position, tensor.nbytes),))
            position += tensor.nbytes
        hashes = {name: future.result() for name, future in futures.items()}
        return hashes if hashes == record["tensors"] else None

    def finish(self, shard: Shard, hashes: dict[str, str]) -> None:
        """Record a shard as done."""
        self._write(shard.name, {"tensors": hashes})

    def work_file(self, name: str) -> Path:
        """A new name in work/ that says which process made it."""
        return self.root / "work" / f"{os.getpid()}@{socket.gethostname()}@{secrets.token_hex(4)}@{name}"

    def _sweep(self) -> None:
        for path in (self.root / "work").iterdir():
            pid, _, rest = path.name.partition("@")
            if rest.startswith(f"{socket.gethostname()}@") and pid.isdigit() and not _is_running(int(pid)):
                self.fs.remove(path)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((self.root / "journal" / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return record

    def _write(self, name: str, record: dict[str, Any]) -> None:
        put(
            self.fs, self.root / "journal" / f"{name}.json", json.dumps(record).encode(), self.work_file(f"{name}.json")
        )


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
    descriptor = fs.create(work)
    try:
        fs.write(descriptor, data)
        fs.sync(descriptor)
    finally:
        fs.close(descriptor)
    fs.rename(work, target)
