"""Mixes of parallelism: loads token by token, times by hand, Tutel's choices, and where one mix overtakes another."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, rows, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.placement.hardware import Hardware
from moectl.routing.placement.loads import batch_loads
from moectl.routing.placement.mixes import Mix, busiest, expert_bytes, held_bytes, mixes, seconds
from moectl.routing.whatif.parallelism import Options, run
from moectl.traces.trace import RoutingTrace

USE = Hardware(8, 10, 20, 2, 1e-6, 1e-6, training=False)
TRAIN = replace(USE, training=True)
"""An expert is 600 weights, 1,200 bytes, 1,200 operations a token; a feature vector is 20 bytes."""


@given(st.integers(1, 24), st.integers(1, 12), st.sampled_from([8, 12, 1024]))
def test_every_mix_and_no_other(gpus: int, experts: int, width: int) -> None:
    expected = {
        (ranks, slices, copies)
        for ranks, slices, copies in product(range(1, gpus + 1), repeat=3)
        if ranks * slices * copies == gpus and ranks <= experts and width % slices == 0
    }
    assert {(mix.ranks, mix.slices, mix.copies) for mix in mixes(gpus, experts, width)} == expected


@settings(max_examples=40, deadline=None)
@given(traces(least_tokens=4), st.sampled_from([Mix(1, 1, 2), Mix(2, 1, 1), Mix(2, 1, 2), Mix(2, 2, 1), Mix(3, 1, 1)]))
def test_the_busiest_rank_token_by_token(found: RoutingTrace, mix: Mix) -> None:
    tokens = len(found) - len(found) % mix.copies
    experts = found.layers[0].point.num_experts
    load = np.zeros((mix.copies, mix.ranks), int)
    rank_of = [rank for rank, part in enumerate(np.array_split(np.arange(experts), mix.ranks)) for _ in part]
    for token, (_, _, _, chosen) in enumerate(rows(found, 0)):
        if token < tokens:
            for expert in chosen:
                load[token // (tokens // mix.copies), rank_of[expert]] += 1
    got = busiest(mix, batch_loads(found.layers[0], tokens // mix.copies)[None])
    assert got.tolist() == [load.max()]


def timed(mix: Mix, largest: float = 30, hardware: Hardware = USE, gb_per_s: float = 1, *, sharded: bool = True) -> Any:
    """For 40 tokens and 4 experts."""
    return seconds(mix, np.array([largest]), 40, 4, hardware, gb_per_s, sharded=sharded)[:, 0]


def test_times_by_hand() -> None:
    # Experts over 4 GPUs: 30 assignments of 1.2 ms; three quarters of 30 x 20 bytes, there and back.
    assert timed(Mix(4, 1, 1)) == pytest.approx([0.036, 2 * 22.5 * 0.02, 0])
    # Over 2, each cut in 2: half the work for each, and every slice gets all.
    assert timed(Mix(2, 2, 1)) == pytest.approx([0.018, 2 * 15 * 0.02, 0])
    # All experts cut in 4: the 40 tokens are gathered, three quarters from elsewhere.
    assert timed(Mix(1, 4, 1)) == pytest.approx([0.009, 2 * 30 * 0.02, 0])
    # Tutel's r = 0: no token is sent, three quarters of 4 experts are.
    assert timed(Mix(1, 1, 4)) == pytest.approx([0.036, 0, 3.6])
    assert (expert_bytes(Mix(1, 1, 4), 4, USE), held_bytes(Mix(1, 1, 4), 4, USE, sharded=True)) == (4800, 1200)


def test_training_takes_three_passes_four_exchanges_and_gradients() -> None:
    mix = Mix(2, 1, 2)
    assert (timed(mix, hardware=TRAIN) / timed(mix)).tolist() == pytest.approx([3, 2, 2])
    assert timed(mix, hardware=TRAIN, sharded=False)[2] == timed(mix, hardware=TRAIN)[2]
    assert timed(mix, sharded=False)[2] == 0


def test_few_tokens_wait_for_memory() -> None:
    assert timed(Mix(4, 1, 1), 1.0, gb_per_s=1e-6)[0] == pytest.approx(1.2)  # 1,200 bytes at 1 kB/s


def test_tutels_choices() -> None:
    names = {mix.name: mix.tutel(2) for mix in mixes(8, 2, 64)}
    assert {name: r for name, r in names.items() if r is not None} == {
        "1 x 1 x 8": 0, "2 x 1 x 4": 1, "2 x 2 x 2": 2, "2 x 4 x 1": 4,
    }  # fmt: skip
    assert {mix.name: mix.tutel(64) for mix in mixes(8, 64, 64) if mix.tutel(64) is not None} == {
        "8 x 1 x 1": 1, "1 x 1 x 8": 0,
    }  # fmt: skip


def even_trace(tokens: int) -> RoutingTrace:
    """Two experts in turn."""
    return trace([[[token % 2] for token in range(tokens)]], 2)


def test_slices_for_few_tokens_and_copies_for_many() -> None:
    """As Tutel has it, whose own rule says the same of both ends; memory and arithmetic cost next to nothing."""
    options = {"gpus": 8, "hidden_size": 64, "intermediate_size": 64, "tflops": 1e6, "memory_gb_per_s": 1e9}
    for tokens, r, auto in ((16, 4, "model"), (1 << 13, 1, "data")):
        found = run(even_trace(tokens), Options(batch_tokens=tokens, **options)).detail
        total = found["total_ms"]
        tutel = {mix.tutel(2): total[mix.name] for mix in mixes(8, 2, 64) if mix.tutel(2)}
        assert min(tutel, key=tutel.__getitem__) == r
        assert found["tutel_auto"] == auto


def test_one_busy_expert_argues_against_ranks() -> None:
    generator = np.random.default_rng(0)
    skewed = np.where(generator.random(4096) < 0.7, 0, generator.integers(0, 8, 4096))
    options = Options(gpus=8, batch_tokens=1024, hidden_size=256, intermediate_size=256, training=False)
    totals = [
        run(trace([index[:, None]], 8), options).detail["total_ms"]
        for index in (skewed, generator.integers(0, 8, 4096))
    ]
    ranks, slices = "8 x 1 x 1", "1 x 8 x 1"
    assert totals[0][ranks] > 4 * totals[1][ranks]
    assert totals[0][slices] == pytest.approx(totals[1][slices])
    assert totals[1][ranks] < totals[1][slices] / 4


def test_fair_routing_is_what_chance_gives_and_the_curve_goes_through_the_table() -> None:
    index = np.argsort(np.random.default_rng(1).random((3, 6400, 16)), axis=2)[..., :4]
    found = run(trace(index, 16), Options(gpus=4, batch_tokens=400))
    place = list(found.curves[0].x).index(400)
    for row in found.rows:
        by_name = dict(zip(found.columns, row, strict=True))
        assert by_name["total ms"] == pytest.approx(by_name["total ms by chance"], rel=0.03)
        line = found.curves[0].lines.get(str(by_name["ranks x slices x copies"]))
        assert line is None or line[place] == pytest.approx(by_name["total ms"])


@settings(max_examples=15, deadline=None)
@given(traces(least_tokens=6))
def test_any_trace(found: RoutingTrace) -> None:
    got = run(found, Options(gpus=6, batch_tokens=12))
    assert all(cell is None or isinstance(cell, str) or np.isfinite(cell) for row in got.rows for cell in row)
    json.dumps(dict(got.detail))


def test_what_does_not_fit_is_not_chosen() -> None:
    found = run(random_trace(0, [64], 8, 2), Options(gpus=4, memory_gb=1e-6))
    assert found.detail["chosen"] is None
    assert found.headline.startswith("No mix fits")
    with pytest.raises(InputError, match="3 tokens"):
        run(random_trace(0, [3], 8, 2), Options(gpus=4))
    with pytest.raises(UsageError, match="gb_per_s"):
        run(random_trace(0, [64], 8, 2), Options(gb_per_s=0))
