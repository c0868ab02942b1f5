"""Weight files nobody should trust: headers that would take the machine down, checkpoints with one fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from files import checkpoint, random_array, with_header

from moectl.checkpoint.source import INDEX, SINGLE

MONSTERS: dict[str, Callable[[], bytes]] = {
    "90 MB of padding": lambda: with_header(b"{}" + b" " * 90_000_000),
    "30 MB of padding": lambda: with_header(b"{}" + b" " * 30_000_000, b"x"),
    "objects 100,000 deep": lambda: with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "lists 10,000,000 deep": lambda: with_header(b'{"a":' + b"[" * 10_000_000 + b"]" * 10_000_000 + b"}"),
    "10,000,000 empty lists": lambda: with_header(b'{"a":[' + b"[]," * 10_000_000 + b"1]}"),
    "10,000,000 empty objects": lambda: with_header(b'{"a":[' + b"{}," * 10_000_000 + b"1]}"),
    "a number of 1,000,000 digits": lambda: with_header(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "a name of 1,000,000 characters": lambda: with_header(b'{"' + b"a" * 1_000_000 + b'":1}'),
    "a length of 2^64 - 1": lambda: b"\xff" * 8 + b"{}",
}


def bad_file(kind: str, tmp_path: Path) -> Path:
    """A checkpoint with one fault."""
    path = checkpoint(tmp_path / "m", {"a": random_array((2,)), "b": random_array((2,))})
    whole = (path / SINGLE).read_bytes()
    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    content = {
        "cut": whole[:-4],
        "trailing": whole + b"\0" * 4,
        "overlap": with_header(b'{"a":' + entry + b',"b":' + entry + b"}", b"\0" * 8),
        "duplicate": with_header(b'{"a":' + entry + b',"a":' + entry + b"}", b"\0" * 8),
    }
    (path / SINGLE).write_bytes(content.get(kind, whole))
    if kind == "outside":
        (tmp_path / "x.safetensors").write_bytes(whole)
        weight_map = dict.fromkeys("ab", str(tmp_path / "x.safetensors"))
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if kind == "unlisted":
        (path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    return path
