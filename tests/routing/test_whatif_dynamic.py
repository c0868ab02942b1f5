"""Placements that change: FasterMoE's formula, FlexMoE's moves and Lina's forecast, by hand and by brute force."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.placement.adapting import flexed, received, shadowed
from moectl.routing.placement.foretelling import foreseen, popularity, proportional, ways
from moectl.routing.placement.hardware import Cost, Hardware
from moectl.routing.placement.packing import contiguous, eplb
from moectl.routing.placement.placement import Placement, gpu_loads
from moectl.routing.whatif.dynamic import POLICIES, Options, run
from moectl.traces.trace import RoutingTrace

LOADS = st.lists(st.integers(0, 50), min_size=4, max_size=8)
FREE = Cost(1.0, 0.0, 0.0)


def test_the_cost_of_gated_experts_by_hand() -> None:
    """Three matrices of 2 x 3, two operations a weight; 4 bytes a value; 1 TFLOP/s, 1 GB/s."""
    hardware = Hardware(8, 2, 3, 4, 1, 1, training=True)
    assert hardware.cost == Cost(pytest.approx(3 * 36e-12), 4 * 8e-9, 72e-9)
    assert replace(hardware, training=False).cost == Cost(36e-12, 2 * 8e-9, 72e-9)


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


def by_hand(slots: list[list[int]], load: list[float], expert_s: float, threshold: float, patience: float) -> list:
    """FlexMoE's moves with lists: the experts of each GPU, changed until a change does not pay."""

    def loads(found: list[list[int]]) -> list[float]:
        copies = Counter(expert for gpu in found for expert in gpu)
        return [sum(load[expert] / copies[expert] for expert in gpu) for gpu in found]

    while max(loads(slots)) > threshold * sum(load) / len(slots):
        copies = Counter(expert for gpu in slots for expert in gpu)
        hot = max(copies, key=lambda expert: (load[expert] / copies[expert], -expert))
        spare = [expert for expert in copies if copies[expert] > 1 and expert != hot]
        if not spare:
            break
        cold = min(spare, key=lambda expert: (load[expert] / copies[expert], expert))
        gpu = min((at for at in range(len(slots)) if cold in slots[at]), key=lambda at: (loads(slots)[at], at))
        changed = [list(each) for each in slots]
        changed[gpu][changed[gpu].index(cold)] = hot
        saved = max(loads(slots)) - max(loads(changed))
        if saved <= 1e-9 or saved * patience <= expert_s:
            break
        slots = changed
    return [sorted(gpu) for gpu in slots]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 3),
    st.integers(0, 5),
    st.sampled_from([0, 2, 1e9]),
    st.sampled_from([1, 1.5]),
)
def test_moves_of_flexmoe(seed: int, gpus: int, spare: int, expert_s: float, threshold: float) -> None:
    """Of loads without ties, which sums in another order would tell otherwise."""
    generator = np.random.default_rng(seed)
    load = (generator.random(generator.integers(4, 9)) ** 3 * 50).tolist()
    start = eplb(np.ones(len(load)), len(load) + spare, gpus)
    found = flexed(start, np.array(load), Cost(1.0, 0.0, expert_s), threshold, 3.0)
    assert found.gpu_S.tolist() == start.gpu_S.tolist()
    before, after = (
        [sorted(each.expert_S[each.gpu_S == gpu].tolist()) for gpu in range(gpus)] for each in (start, found)
    )
    assert after == by_hand(before, load, expert_s, threshold, 3.0)


def test_flexmoe_keeps_still_below_its_threshold_and_when_it_does_not_pay() -> None:
    """A second copy of the third expert, which few want, becomes one of the first: 20 and 4 become 11 and 13."""
    start, load_E = Placement(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1]), 3, 2), np.array([18, 2, 4])
    moved = flexed(start, load_E, FREE, 1.0, 1.0)
    assert (moved.expert_S.tolist(), gpu_loads(moved, load_E).tolist()) == ([0, 1, 0, 2], [11, 13])
    assert flexed(start, load_E, FREE, 2.0, 1.0) is start
    assert flexed(start, load_E, Cost(1.0, 0.0, 7.5), 1.0, 1.0) is start
    assert flexed(start, load_E, Cost(1.0, 0.0, 7.5), 1.0, 2.0) is not start
    assert flexed(contiguous(3, 2), load_E, FREE, 1.0, 1.0).expert_S.tolist() == [0, 1, 2]


def test_experts_that_are_received() -> None:
    before, after = contiguous(4, 2), Placement(np.array([0, 2, 3, 1]), np.array([0, 0, 1, 1]), 4, 2)
    assert (received(before, after), received(before, before)) == (1, 0)


@settings(max_examples=30, deadline=None)
@given(traces(least_tokens=2), st.integers(1, 2), st.integers(1, 3))
def test_forecasts_by_counting(found: RoutingTrace, path: int, top_k: int) -> None:
    back, last = found.layers[:-1][-path:], found.layers[-1]
    if not back:
        return
    experts, tokens = last.point.num_experts, len(found)
    way_T = ways(np.stack([each.index_TK[:, 0] for each in back]), experts)
    popular = popularity(way_T[: tokens // 2], last.index_TK[: tokens // 2], experts, top_k)
    keys = [tuple(int(each.index_TK[token, 0]) for each in back) for token in range(tokens)]
    chosen = [[int(expert) for expert in row if expert >= 0] for row in last.index_TK]
    expected = np.zeros(experts)
    for token in range(tokens // 2, tokens):
        alike = Counter(e for other in range(tokens // 2) if keys[other] == keys[token] for e in chosen[other])
        alike = alike or Counter(e for other in range(tokens // 2) for e in chosen[other])
        for expert in sorted(alike, key=lambda expert: (-alike[expert], expert))[:top_k]:
            expected[expert] += alike[expert] / alike.total()
    assert foreseen(way_T[tokens // 2 :], popular, experts) == pytest.approx(expected)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 6))
def test_gpus_in_proportion(load: list[int], gpus: int) -> None:
    """Equation 1 and first-fit decreasing."""
    found = proportional(np.array(load), gpus)
    needs = [gpus * each / max(sum(load), 1) for each in load]
    copies = [max(1, floor(need + 0.5)) for need in needs]
    items = sorted(
        (-need / count, expert)
        for expert, (need, count) in enumerate(zip(needs, copies, strict=True))
        if need
        for _ in range(count)
    )
    level, expected = [0.0] * gpus, [[] for _ in range(gpus)]
    for size, expert in items:
        fits = [gpu for gpu in range(gpus) if not level[gpu] or level[gpu] - size < 1 + 1e-9]
        gpu = fits[0] if fits else level.index(min(level))
        level[gpu] -= size
        expected[gpu].append(expert)
    free = [gpu for gpu in range(gpus) if not expected[gpu]] or list(range(gpus))
    for number, expert in enumerate(expert for expert, need in enumerate(needs) if not need):
        expected[free[number % len(free)]].append(expert)
    assert [sorted(found.expert_S[found.gpu_S == gpu].tolist()) for gpu in range(gpus)] == [
        sorted(each) for each in expected
    ]
    assert (found.copies_E >= 1).all()


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
    even = found["imbalance"]
    # The first layer stays as it stands; of the other, Lina knows all.
    first = run(RoutingTrace(chained(3).tokens, chained(3).layers[:1]), options).detail["imbalance"]
    assert first["lina"] == first["contiguous"]
    assert 2 * even["lina"] - first["contiguous"] == pytest.approx(even["perfect"], abs=0.15)
    assert even["once"] > even["perfect"] + 0.3
    assert even["flexmoe"] < even["once"]
    still = run(chained(0), options).detail["imbalance"]
    assert still["once"] < even["once"] - 0.3


def test_batches_that_are_all_alike_leave_nothing_to_move() -> None:
    batch = np.array([0, 0, 0, 1, 2, 3, 4, 5])
    found = run(trace([np.tile(batch, 16)[:, None]], 6), Options(gpus=3, replicas=3, batch_tokens=8))
    by_policy = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    for alike in (("once", "each batch", "perfect"), ("contiguous", "lina", "lina corrected")):
        assert len({by_policy[policy]["largest load over the mean"] for policy in alike}) == 1
    assert {by_policy[policy]["experts moved a batch"] for policy in POLICIES if policy != "fastermoe"} == {0.0}


def test_fair_routing_is_what_chance_gives() -> None:
    index = np.argsort(np.random.default_rng(1).random((4, 6400, 16)), axis=2)[..., :4]
    even = run(trace(index, 16), Options(gpus=4, batch_tokens=200)).detail["imbalance"]
    assert even["contiguous"] - 1 == pytest.approx(even["chance"] - 1, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(traces(least_tokens=8), st.integers(1, 3))
def test_any_trace(found: RoutingTrace, path: int) -> None:
    got = run(found, Options(gpus=3, replicas=1, batch_tokens=5, path=path))
    assert [row[0] for row in got.rows] == [*POLICIES, "chance"]
    assert all(cell is None or isinstance(cell, str) or np.isfinite(cell) for row in got.rows for cell in row)
    json.dumps(dict(got.detail))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="7 tokens"):
        run(random_trace(0, [7], 4, 1), Options())
    with pytest.raises(UsageError, match="path"):
        Options(path=4)
