"""Every malformed safetensors file is refused by name, before any weight is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from files import random_array, safetensors_bytes, with_header

from moectl.checkpoint.header import read_header
from moectl.errors import InputError

GOOD = safetensors_bytes({"a": random_array((2, 3)), "b": random_array((4,))})


def entry(dtype: object = "F32", shape: object = None, offsets: object = None) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [1] if shape is None else shape,
        "data_offsets": [0, 4] if offsets is None else offsets,
    }


def header(**tensors: object) -> bytes:
    return with_header(json.dumps(tensors).encode(), b"\0" * 8)


BAD = {
    "cut by one byte": (GOOD[:-1], "cut short: expected"),
    "cut inside the header": (GOOD[:40], "says its header is"),
    "trailing bytes": (GOOD + b"\0\0\0\0", "bytes after its last tensor"),
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "says its header is"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git-LFS pointer"),
    "pickle": (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    "not utf-8": (with_header(b'{"\xff": 1}'), "not UTF-8"),
    "not json": (with_header(b"{nonsense}"), "not valid JSON"),
    "a list": (with_header(b"[1, 2]"), "does not begin with '{'"),
    "leading space": (with_header(b" {}"), "does not begin with '{'"),
    "deep nesting": (with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "not valid JSON"),
    "duplicate name": (
        with_header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        "names the tensor 'a' twice",
    ),
    "overlap": (header(a=entry(offsets=[0, 4]), b=entry(shape=[1], offsets=[0, 4])), "overlaps"),
    "hole": (header(a=entry(), b=entry(offsets=[5, 9])), "leaves a hole"),
    "reversed": (header(a=entry(offsets=[4, 0])), "takes 4"),
    "out of range": (header(a=entry(offsets=[0, 4]), b=entry(shape=[2], offsets=[4, 12])), "cut short"),
    "negative shape": (header(a=entry(shape=[-1])), "not a list of sizes"),
    "float shape": (header(a=entry(shape=[1.0])), "not a list of sizes"),
    "bool shape": (header(a=entry(shape=[True])), "not a list of sizes"),
    "unknown dtype": (header(a=entry(dtype="Q7")), "not supported"),
    "wrong size": (header(a=entry(dtype="F64")), "takes 8"),
    "overflow": (header(a=entry(shape=[2**62, 2**62])), "takes"),
    "metadata of numbers": (with_header(b'{"__metadata__": {"a": 1}}'), "map of strings"),
    "entry is a list": (header(a=[1]), "by a list"),
    "escape in a name": (header(**{"a\x1b[2J": entry()}), r"unusable name: 'a\\x1b[2J'"),
    "path in a name": (header(**{"../a": entry()}), "unusable name"),
    "empty name": (header(**{"": entry()}), "unusable name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, message = BAD[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(path) in caught.value.what
    assert message in caught.value.what
    assert caught.value.fix
    assert all(c.isprintable() for c in caught.value.what)


def test_good_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    expected = load_file(path)
    refs = read_header(path)
    assert set(refs) == set(expected)
    for name, ref in refs.items():
        raw = GOOD[ref.offset : ref.offset + ref.nbytes]
        assert np.array_equal(np.frombuffer(raw, "<f4").reshape(ref.shape), expected[name])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        read_header(tmp_path / "none.safetensors")
