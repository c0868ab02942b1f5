"""Disks that fail, processes that are killed and machines that lose power, at the n-th effect of a writer."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moectl.checkpoint.fs import FileSystem

VERBS = [name for name in vars(FileSystem) if not name.startswith("_")]


class Effects(FileSystem):
    """Counts effects and hands each to `around`; nothing is really forced to the disk, which only takes time."""

    def __init__(self) -> None:
        self.done = 0

    def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
        return effect(*arguments)

    def sync(self, descriptor: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


def _counted(verb: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Effects, *arguments: Any) -> Any:
        self.done += 1
        return self.around(verb, arguments, lambda *args: inner(self, *args))

    return method


for _verb in VERBS:
    setattr(Effects, _verb, _counted(_verb, vars(Effects).get(_verb) or vars(FileSystem)[_verb]))


class Failing(Effects):
    """The n-th effect, and none after it, fails with an error of the system."""

    def __init__(self, n: int, code: int) -> None:
        super().__init__()
        self.n, self.code = n, code

    def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
        if self.done != self.n:
            return effect(*arguments)
        if verb == "close":
            effect(*arguments)
        raise OSError(self.code, os.strerror(self.code))


class Killed(Effects):
    """The process kills itself at the n-th effect: before it, or when it is half done (`torn`)."""

    def __init__(self, n: int, torn: bool) -> None:
        super().__init__()
        self.n, self.torn = n, torn

    def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
        if self.done != self.n:
            return effect(*arguments)
        if self.torn:
            _half(verb, arguments, effect)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def _half(verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> None:
    if verb == "write":
        descriptor, data = arguments
        effect(descriptor, bytes(data)[: len(data) // 2])
    elif verb == "copy":
        source, name, offset, nbytes, target = arguments
        effect(source, name, offset, nbytes // 2, target)
    elif verb == "remove_tree":
        # Names in the worst order: journal/plan.json goes first, the shards and their records are still there.
        files = sorted((p for p in arguments[0].rglob("*") if p.is_file()), key=lambda p: (p.name != "plan.json", p))
        for path in files[: len(files) // 4 + 1]:
            path.unlink()
    elif verb == "rename_new":
        os.link(*arguments)
    else:
        effect(*arguments)


def killed(run: Callable[[], Any]) -> bool:
    """Run in a forked child; whether it was killed rather than came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed of itself"
    return os.WIFSIGNALED(status)


class PowerLoss(BaseException):
    """The machine is off."""


class _File:
    def __init__(self, content: bytes = b"", durable: bytes | None = None) -> None:
        self.content, self.durable = bytearray(content), durable


class _Directory:
    def __init__(self) -> None:
        self.entries: dict[str, _File | _Directory] = {}
        self.durable: dict[str, _File | _Directory] = {}


class Volatile(Effects):
    """A disk with a cache, of which the power goes at the n-th effect.

    A file's content is safe up to the last fsync of that file, a directory's names up to the last fsync of that
    directory. `settle` makes of the real directory what a machine could find after the power is back.
    """

    def __init__(self, disk: Path, n: int) -> None:
        super().__init__()
        self.disk, self.n, self.off = disk, n, False
        self.top = self._load(disk)
        self.opened: dict[int, _File] = {}

    def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
        if self.done == self.n:
            self.off = True
        if self.off:
            if verb == "close":
                effect(*arguments)
            raise PowerLoss
        result = effect(*arguments)
        getattr(self, "_" + verb)(result, *arguments)
        return result

    def settle(self, how: str, choose: random.Random) -> None:
        """`lost`: only what is safe; `ahead`: all names, but contents only where safe; `mixed`: whatever, anywhere."""
        shutil.rmtree(self.disk)
        self._make(self.top, self.disk, how, choose)

    def _make(self, node: _File | _Directory, path: Path, how: str, choose: random.Random) -> None:
        kept = how == "ahead" or (how == "mixed" and choose.random() < 0.5)
        if isinstance(node, _File):
            whole = how == "mixed" and kept
            path.write_bytes(bytes(node.content) if whole else node.durable or b"")
            return
        path.mkdir()
        for name, child in (node.entries if kept else node.durable).items():
            self._make(child, path / name, how, choose)

    def _load(self, path: Path) -> _File | _Directory:
        if path.is_file():
            return _File(path.read_bytes(), path.read_bytes())
        node = _Directory()
        node.entries = {child.name: self._load(child) for child in path.iterdir()}
        node.durable = dict(node.entries)
        return node

    def _directory(self, path: Path) -> _Directory:
        node = self.top
        for name in path.relative_to(self.disk).parts:
            assert isinstance(node, _Directory)
            node = node.entries[name]
        assert isinstance(node, _Directory)
        return node

    def _make_directory(self, _: None, path: Path) -> None:
        self._directory(path.parent).entries.setdefault(path.name, _Directory())

    def _create(self, descriptor: int, path: Path) -> None:
        self.opened[descriptor] = file = _File()
        self._directory(path.parent).entries[path.name] = file

    def _write(self, _: None, descriptor: int, data: bytes) -> None:
        self.opened[descriptor].content += data

    def _copy(self, _: None, source: int, name: Path, offset: int, nbytes: int, target: int) -> None:
        self.opened[target].content += os.pread(source, nbytes, offset)

    def _sync(self, _: None, descriptor: int) -> None:
        self.opened[descriptor].durable = bytes(self.opened[descriptor].content)

    def _close(self, _: None, descriptor: int) -> None:
        del self.opened[descriptor]

    def _sync_directory(self, _: None, path: Path) -> None:
        node = self._directory(path)
        node.durable = dict(node.entries)

    def _rename(self, _: None, source: Path, target: Path) -> None:
        node = self._directory(source.parent).entries.pop(source.name)
        self._directory(target.parent).entries[target.name] = node

    _rename_new = _rename

    def _remove(self, _: None, path: Path) -> None:
        self._directory(path.parent).entries.pop(path.name, None)

    _remove_tree = _remove
