"""Damaged foreign files give an InputError or a recording that holds together, and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from foreign import choices, lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ingest import FORMAT, written

from moectl.errors import InputError
from moectl.routing.ingest.formats import read
from moectl.traces.store import Recording, save

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

Edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
Tokens = st.sampled_from(
    [b"", b"-1", b"0", b"99999999999", b"1.5", b"null", b"[]", b"{}", b'"x"', b"[[1]]", b",", b"\n"]
)


@cache
def valid(name: str) -> tuple[str, bytes]:
    """A file of that format: its name and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = written(name, Path(folder))
        return path.name, path.read_bytes()


def survives(name: str, data: bytes, **facts: int | None) -> None:
    """Reading that data gives a whole recording or an InputError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        for format in (None, FORMAT_OF[name]):
            try:
                recordings = read(path, format, **facts)
            except InputError as error:
                assert error.what
                continue
            for recording in recordings.values():
                holds_together(recording)


def holds_together(recording: Recording) -> None:
    """Counts agree with the trace, where there is one."""
    statistics, trace = recording.statistics, recording.trace
    assert statistics.loads and statistics.tokens > 0
    for routed, load in zip(trace.layers, statistics.loads, strict=True):
        assert load.count_E.min() >= 0
        assert load.count_E.sum() + load.dropped == statistics.tokens * routed.point.top_k
        if recording.sampled == 1:
            chosen = routed.index_TK[routed.index_TK >= 0]
            assert np.array_equal(load.count_E, np.bincount(chosen, minlength=routed.point.num_experts))


FORMAT_OF = {valid(name)[0]: FORMAT[name] for name in FORMAT}


@pytest.mark.parametrize("name", FORMAT)
@QUICK
@given(edits=Edits, cut=st.floats(0, 1), cuts=st.booleans())
def test_changed_bytes_and_short_files(name: str, edits: list[tuple[float, int]], cut: float, cuts: bool) -> None:
    file, data = valid(name)
    changed = bytearray(data)
    for place, byte in edits:
        changed[int(place * len(changed))] = byte
    survives(file, bytes(changed[: int(cut * len(changed))] if cuts else changed), top_k=2)


@pytest.mark.parametrize("name", ["olmoe", "megatron", "vllm", "sglang", "narrow", "wide"])
@QUICK
@given(place=st.floats(0, 1, exclude_max=True), token=Tokens, top_k=st.sampled_from([None, 1, 2, 3]))
def test_changed_values(name: str, place: float, token: bytes, top_k: int | None) -> None:
    """One value of the text is another: a number, nothing, a list, the end of a line."""
    file, data = valid(name)
    parts = data.replace(b"[", b"[ ").replace(b",", b", ").split(b" ")
    at = int(place * len(parts))
    tail = b"," if parts[at].endswith(b",") else b""
    survives(file, b" ".join([*parts[:at], token + tail, *parts[at + 1 :]]), top_k=top_k)


@QUICK
@given(seed=st.integers(0, 10**6))
def test_our_own_description_with_a_changed_value(seed: int) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path, _ = written("olmoe", Path(folder))
        save(read(path), Path(folder) / "trace")
        description = Path(folder) / "trace" / "trace.json"
        document = json.loads(description.read_text())
        holders = [document]
        for holder in holders:
            values = holder.values() if isinstance(holder, dict) else holder
            holders += [value for value in values if isinstance(value, dict | list)]
        holder = generator.choice([holder for holder in holders if holder])
        key = generator.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = generator.choice([None, -1, 3, 10**12, "x", [], {}, 0.5])
        description.write_text(json.dumps(document))
        with contextlib.suppress(InputError):
            read(Path(folder) / "trace")


@QUICK
@given(seed=st.integers(0, 10**6))
def test_our_own_arrays_of_another_trace(seed: int) -> None:
    """A file of a trace of other tokens, layers or experts in the place of its own."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path, _ = written("olmoe", root)
        save(read(path), root / "trace")
        other = lines(
            root / "other.jsonl", [{"routed_experts": choices(5, layers=generator.choice([1, 3, 4])).tolist()}]
        )
        save(read(other, num_experts=generator.choice([8, 9])), root / "other")
        file = generator.choice(sorted((root / "trace").glob("*.safetensors"))).name
        (root / "trace" / file).write_bytes((root / "other" / file).read_bytes())
        with pytest.raises(InputError, match=r"do not fit together|has the shape|names expert|KeyError"):
            read(root / "trace")
