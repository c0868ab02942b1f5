"""Placements that change: FasterMoE's formula, FlexMoE's moves and Lina's forecast, by hand and by brute force."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.placement.adapting import (
    Cost,
    cost_model,
    flexed,
    foreseen,
    popularity,
    received,
    shadowed,
    ways,
)
from moectl.routing.placement.packing import contiguous, eplb
from moectl.routing.placement.placement import Placement, gpu_loads
from moectl.routing.whatif.dynamic import POLICIES, Options, run
from moectl.traces.trace import RoutingTrace

LOADS = st.lists(st.integers(0, 50), min_size=4, max_size=8)
FREE = Cost(1.0, 0.0, 0.0)


def test_the_cost_of_gated_experts_by_hand() -> None:
    """Three matrices of 2 x 3, two operations a weight; 4 bytes a value; 1 TFLOP/s, 1 GB/s."""
    assert cost_model(2, 3, 4, 1, 1, training=True) == Cost(pytest.approx(3 * 36e-12), 4 * 8e-9, 72e-9)
    assert cost_model(2, 3, 4, 1, 1, training=False) == Cost(36e-12, 2 * 8e-9, 72e-9)


@given(LOADS, st.sampled_from([0.0, 0.5, 3.0, 1e9]))
def test_shadowing_follows_the_formula(load: list[int], expert_s: float) -> None:
    cost = Cost(2.0, 0.5, expert_s)
    copied = shadowed(np.array(load), cost)
    falling = sorted(load, reverse=True)
    best, count = 2.5 * falling[0], 0
    for k in range(1, len(load)):
        lat = 2.5 * falling[k] + k * expert_s
        if lat >= best:
            break
        best, count = lat, k
    assert copied.sum() == count
    assert sorted(np.array(load)[copied].tolist(), reverse=True) == falling[:count]


@given(LOADS, st.integers(2, 3), st.integers(0, 3), st.sampled_from([0.0, 2.0, 1e9]))
def test_moves_of_flexmoe(load: list[int], gpus: int, spare: int, expert_s: float) -> None:
    load_E = np.array(load)
    before = eplb(np.ones(len(load)), len(load) + spare, gpus)
    after = flexed(before, load_E, Cost(1.0, 0.0, expert_s), 1.0, 1.0)
    assert (after.copies_E >= 1).all()
    assert after.gpu_S.tolist() == before.gpu_S.tolist()
    gain = gpu_loads(before, load_E).max() - gpu_loads(after, load_E).max()
    moved = not np.array_equal(before.expert_S, after.expert_S)
    assert gain > expert_s if moved else gain == 0


@settings(max_examples=50)
@given(LOADS)
def test_flexmoe_stops_where_no_change_of_its_kind_helps(load: list[int]) -> None:
    load_E = np.array(load)
    found = flexed(eplb(np.ones(len(load)), len(load) + 2, 2), load_E, FREE, 1.0, 1.0)
    largest = gpu_loads(found, load_E).max()

    def after(expert_S: np.ndarray) -> float:
        return float(gpu_loads(Placement(expert_S, found.gpu_S, len(load), 2), load_E).max())

    for one, other in combinations(range(len(found.expert_S)), 2):
        swapped = found.expert_S.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert after(swapped) >= largest - 1e-9


def test_flexmoe_keeps_still_below_its_threshold_and_when_it_does_not_pay() -> None:
    start, load_E = contiguous(4, 2), np.array([10, 10, 1, 1])
    assert gpu_loads(flexed(start, load_E, FREE, 1.0, 1.0), load_E).tolist() == [11, 11]
    assert flexed(start, load_E, FREE, 2.0, 1.0) is start
    assert flexed(start, load_E, Cost(1.0, 0.0, 9.5), 1.0, 1.0) is start
    assert flexed(start, load_E, Cost(1.0, 0.0, 9.5), 1.0, 2.0) is not start


def test_experts_that_are_received() -> None:
    before, after = contiguous(4, 2), Placement(np.array([0, 2, 3, 1]), np.array([0, 0, 1, 1]), 4, 2)
    assert (received(before, after), received(before, before)) == (1, 0)


@settings(max_examples=30, deadline=None)
@given(traces(least_tokens=2), st.integers(1, 2))
def test_forecasts_by_counting(found: RoutingTrace, path: int) -> None:
    back, last = found.layers[:-1][-path:], found.layers[-1]
    if not back:
        return
    experts, tokens = last.point.num_experts, len(found)
    way_T = ways(np.stack([each.index_TK[:, 0] for each in back]), experts)
    popular_WE = popularity(way_T[: tokens // 2], last.index_TK[: tokens // 2], (experts + 1) ** len(back), experts)
    keys = [tuple(int(each.index_TK[token, 0]) for each in back) for token in range(tokens)]
    expected = np.zeros(experts)
    for token in range(tokens // 2, tokens):
        alike = [other for other in range(tokens // 2) if keys[other] == keys[token]] or list(range(tokens // 2))
        for other in alike:
            for expert in last.index_TK[other]:
                if expert >= 0:
                    expected[expert] += 1 / len(alike)
    assert foreseen(way_T[tokens // 2 :], popular_WE) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def chained(shift: int) -> RoutingTrace:
    """Layer 1 goes where layer 0 went, plus one; half way through, layer 0 goes elsewhere by `shift`."""
    generator = np.random.default_rng(0)
    first = generator.choice(8, 1600, p=[0.4, 0.3, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
    first[800:] = (first[800:] + shift) % 8
    return trace([first[:, None], (first[:, None] + 1) % 8], 8)


def test_the_layer_before_foretells_what_the_past_does_not() -> None:
    options = Options(gpus=4, replicas=4, batch_tokens=100, tflops=0.01)  # slow enough for every move to pay
    found = run(chained(3), options).detail
    assert found["lina_busiest_foreseen"] == 1.0
    # The first layer has nothing before it; of the other, Lina knows all: half of the loss of `once` is left.
    even = found["imbalance"]
    assert even["lina"] == pytest.approx((even["once"] + even["perfect"]) / 2, abs=0.06)
    assert even["once"] > even["perfect"] + 0.3
    assert even["flexmoe"] < even["once"]
    still = run(chained(0), options).detail["imbalance"]
    assert still["once"] < even["once"] - 0.3


def test_batches_that_are_all_alike_leave_nothing_to_move() -> None:
    batch = np.array([0, 0, 0, 1, 2, 3, 4, 5])
    found = run(trace([np.tile(batch, 16)[:, None]], 6), Options(gpus=3, replicas=3, batch_tokens=8))
    by_policy = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    same = {by_policy[policy]["largest load over the mean"] for policy in ("once", "each batch", "lina", "perfect")}
    assert len(same) == 1
    assert {by_policy[policy]["experts moved a batch"] for policy in POLICIES if policy != "fastermoe"} == {0.0}


def test_fair_routing_is_what_chance_gives() -> None:
    index = np.argsort(np.random.default_rng(1).random((4, 6400, 16)), axis=2)[..., :4]
    even = run(trace(index, 16), Options(gpus=4, batch_tokens=200)).detail["imbalance"]
    assert even["contiguous"] - 1 == pytest.approx(even["chance"] - 1, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(traces(least_tokens=8), st.integers(1, 2))
def test_any_trace(found: RoutingTrace, path: int) -> None:
    got = run(found, Options(gpus=3, replicas=1, batch_tokens=5, path=path))
    assert [row[0] for row in got.rows] == [*POLICIES, "chance"]
    assert all(cell is None or isinstance(cell, str) or np.isfinite(cell) for row in got.rows for cell in row)
    json.dumps(dict(got.detail))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="7 tokens"):
        run(random_trace(0, [7], 4, 1), Options())
    with pytest.raises(UsageError, match="path"):
        Options(path=3)
