"""Read and check one safetensors header with plain Python: no torch, no mmap, no trust.

The library accepts files this project must not (duplicate names, a header that does not start with `{`),
and its messages name no file; so the format's own rules are checked here, each with the path in the message.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.checkpoint.dtypes import ITEM_BYTES
from moectl.errors import InputError
from moectl.text import escape, shown

MAX_HEADER_BYTES = 32_000_000
"""Room for 200,000 tensors. The format allows 100 MB, of which hostile JSON makes gigabytes when it is parsed."""

MAX_DIMS = 16
MAX_DEPTH = 64
MANY_BRACKETS = 10_000
"""Beyond these, one in 16 characters: the densest honest header has three in 50, and an empty list takes 56 bytes."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: absolute byte `offset` and `nbytes` in `file`; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def parse_json(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON that can be walked, printed and hashed again without running out of stack.

    Raises:
        ValueError: it is not JSON, or lists and objects lie more than `MAX_DEPTH` deep in one another.
    """
    if text.count("[") + text.count("{") > MANY_BRACKETS + len(text) // 16:
        raise ValueError("more lists and objects than text")
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _members(outer)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _members(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, in file order.

    Raises:
        InputError: the file is missing, cut, padded, not safetensors, or its offsets are not a partition of its data.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _bad(path, f"cannot be opened: {error.strerror}", "Check the path and its permissions.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "is not a regular file")
        size = status.st_size
        text, data_start = _header_text(descriptor, path, size)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}", "Check the disk or network it is on.") from None
    finally:
        os.close(descriptor)
    try:
        header = parse_json(text, _no_duplicates)
    except _DuplicateName as error:
        raise _bad(path, f"names the tensor {shown(str(error))!r} twice") from None
    except ValueError as error:
        raise _bad(path, f"has a header that is not valid JSON ({shown(str(error))})") from None
    if not isinstance(header, dict):
        raise _bad(path, f"has a header that is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "has `__metadata__` that is not a map of strings")
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_partition(path, tensors, data_start, size)
    return tensors


def _header_text(descriptor: int, path: Path, size: int) -> tuple[str, int]:
    prefix = os.pread(descriptor, 64, 0)
    if prefix.startswith(b"version https://git-lfs"):
        raise _bad(
            path,
            "is a Git-LFS pointer, not weights",
            "Fetch the real file: `git lfs pull` in its repository, or `hf download` the model again.",
        )
    if len(prefix) < 8:
        raise _bad(path, f"is {size} bytes long, too short for a safetensors header")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES or 8 + length > size:
        pickled = prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
        if MAX_HEADER_BYTES < length <= size - 8:
            raise _bad(path, f"has a header of {length} bytes, more than the {MAX_HEADER_BYTES} read here")
        what = (
            "is a pickle (PyTorch) file, not safetensors"
            if pickled
            else f"says its header is {length} bytes long, but the file has {size} bytes"
        )
        raise _bad(path, what)
    raw = os.pread(descriptor, length, 8)
    if len(raw) != length:
        raise _bad(path, f"ended after {len(raw)} of {length} header bytes while it was read")
    if not raw.startswith(b"{"):
        raise _bad(path, "has a header that does not begin with '{'")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError:
        raise _bad(path, "has a header that is not UTF-8") from None


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    named = shown(name)
    if not name or not name.isprintable() or "/" in name or "\\" in name:
        raise _bad(path, f"has a tensor with an unusable name: {named!r}")
    if not isinstance(entry, dict):
        raise _bad(path, f"describes tensor {named!r} by a {type(entry).__name__}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"gives tensor {named!r} the dtype {shown(dtype)!r}, which is not supported")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        raise _bad(path, f"gives tensor {named!r} the shape {shown(shape, 80)}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _bad(path, f"gives tensor {named!r} the offsets {shown(offsets, 80)}, which are not two sizes")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise _bad(path, f"gives tensor {named!r} {end - begin} bytes, but {dtype} {shape} takes {expected}")
    return TensorRef(name, dtype, tuple(shape), path, data_start + begin, expected)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_partition(path: Path, tensors: dict[str, TensorRef], data_start: int, size: int) -> None:
    position = data_start
    for ref in sorted(tensors.values(), key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != position:
            kind = "overlaps the tensor before it" if ref.offset < position else "leaves a hole before it"
            raise _bad(path, f"stores tensor {shown(ref.name)!r} at byte {ref.offset}, expected {position}: it {kind}")
        position += ref.nbytes
    if position != size:
        state = "is cut short" if size < position else "has bytes after its last tensor"
        raise _bad(path, f"{state}: expected {position} bytes, found {size}")


class _DuplicateName(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateName(key)
            seen.add(key)
    return result


def _bad(path: Path, what: str, fix: str = "") -> InputError:
    return InputError(
        f"{escape(str(path))} {what}.",
        "Reading weights from it could give a wrong model, so nothing was done.",
        fix or "Download or write the file again (`hf cache verify` checks a Hub download).",
    )
