"""What is counted adds up over parts, and comes back from disk as it was."""

from __future__ import annotations

import mmap
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_traces import random_trace, traces

from moectl.errors import InputError, UsageError
from moectl.traces.statistics import BLOCKS, blocks_of, by_domain, statistics_of
from moectl.traces.store import Recording, bytes_per_token, load, save
from moectl.traces.trace import RoutingTrace


def same(one: object, other: object) -> bool:
    """Whether two results are equal, up to the rounding of sums."""
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | float):
        return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    return one == other


@given(traces(), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_the_statistics_of_two_parts_add_up_to_those_of_the_whole(traced: RoutingTrace, cut: int) -> None:
    first_T = traced.tokens.document_T < cut
    parts = statistics_of(traced.where(first_T)) + statistics_of(traced.where(~first_T))
    assert same(parts, statistics_of(traced))


def test_statistics_of_other_models_do_not_add() -> None:
    with pytest.raises(InputError, match="not of the same model and domains"):
        statistics_of(random_trace(0, [3], 4, 2)) + statistics_of(random_trace(0, [3], 5, 2))


def test_documents_are_dealt_to_blocks_of_their_domain_in_turn() -> None:
    domain_N = np.array([0, 1] * 150)
    block_N, domain_B = blocks_of(domain_N, 2)
    assert (domain_B[block_N] == domain_N).all()
    many = np.bincount(block_N, minlength=2 * BLOCKS)
    assert set(many) == {1, 2} and by_domain(many, domain_B, ("a", "b")).tolist() == [150, 150]


@given(traces(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, traced: RoutingTrace, sampled: bool
) -> None:
    place = tmp_path_factory.mktemp("store") / "trace"
    recording = Recording(statistics_of(traced), traced, 0.5 if sampled else 1.0)
    save({"decoder": recording, "encoder": recording}, place)
    found = load(place)
    assert list(found) == ["decoder", "encoder"]
    assert all(same(recording, back) for back in found.values())
    kept = sum(path.stat().st_size for path in place.glob("decoder.[tl]*.safetensors"))
    points = tuple(routed.point for routed in traced.layers)
    assert kept >= bytes_per_token(points, scores=True) * len(traced)


def test_a_trace_is_replaced_when_asked_and_nothing_else_ever(tmp_path: Path) -> None:
    traced = random_trace(0, [3], 4, 2)
    recordings = {"decoder": Recording(statistics_of(traced), traced)}
    save(recordings, tmp_path / "trace")
    with pytest.raises(UsageError, match="exists"):
        save(recordings, tmp_path / "trace")
    save(recordings, tmp_path / "trace", overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        save(recordings, tmp_path, overwrite=True)


def test_what_is_loaded_is_mapped_and_read_only_where_it_is_looked_at(tmp_path: Path) -> None:
    traced = random_trace(0, [3], 4, 2)
    save({"decoder": Recording(statistics_of(traced), traced)}, tmp_path / "trace")
    array = score_TE = load(tmp_path / "trace")["decoder"].trace.layers[0].score_TE
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array.base, mmap.mmap) and not score_TE.flags.writeable


@pytest.mark.parametrize(
    "arrays", [{"0.index": np.zeros((3, 2), np.uint32)}, {"0.index": np.zeros((3, 2), np.float16)}]
)
def test_arrays_of_another_type_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    traced = random_trace(0, [3], 4, 2, layers=1)
    save({"decoder": Recording(statistics_of(traced), traced)}, tmp_path / "trace")
    save_file(arrays, tmp_path / "trace" / "decoder.layers.safetensors")
    with pytest.raises(InputError, match=r"U32|fit together"):
        load(tmp_path / "trace")


@pytest.mark.parametrize("file", ["decoder.tokens.safetensors", "decoder.layers.safetensors", "trace.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_trace_is_an_error_that_names_the_file(tmp_path: Path, file: str, damage: str) -> None:
    traced = random_trace(0, [3], 4, 2)
    save({"decoder": Recording(statistics_of(traced), traced)}, tmp_path / "trace")
    path = tmp_path / "trace" / file
    kept = path.read_bytes()
    path.write_bytes({"cut": kept[: len(kept) // 2], "gone": b"", "noise": bytes(reversed(kept))}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(InputError, match="trace"):
        load(tmp_path / "trace")
    shutil.rmtree(tmp_path / "trace")
