"""Caches against plain simulations, Belady against all that could be evicted, and what random routing finds in them."""

from __future__ import annotations

import json
from collections import OrderedDict
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.whatif.cache import STATIC, Options, run
from moectl.routing.whatif.eviction import BELADY, INFINITY, LFU, LRU, PROTECTED, Requests, hits
from moectl.routing.whatif.hit_rates import chance, drawn_like, found, requested, static_chance
from moectl.traces.trace import DECODE, Point, Routed, RoutingTrace

POLICIES = (LRU, LFU, PROTECTED, INFINITY, BELADY)
BOTH = {"one": False, "empty": False}


@st.composite
def requests(draw: st.DrawFn, most: int = 24) -> Requests:
    """Steps of 1 to 3 layers in turn, some choices dropped or repeated, documents that start anywhere."""
    layers, experts, choices = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.integers(1, most // layers)) * layers
    expert_NK = generator.integers(0, experts, (steps, choices))
    key_NK = np.where(
        generator.random((steps, choices)) < 0.2, -1, expert_NK + (np.arange(steps) % layers * experts)[:, None]
    )
    start_N = (np.arange(steps) % layers == 0) & (generator.random(steps) < 0.3)
    start_N[0] = True
    layer_C = np.repeat(np.arange(layers), experts)
    group_N = generator.integers(0, 2, steps)
    return Requests(key_NK.astype(np.int32), layer_C, start_N, group_N, 2, draw(st.booleans()))


def steps_of(asked: Requests) -> list[list[int]]:
    return [list(dict.fromkeys(int(key) for key in row if key >= 0)) for row in asked.key_NK]


def simulated(asked: Requests, policy: str, size: int) -> list[int]:
    """Hits of one cache, from the words of what a policy holds, with a scan over all that is in it."""
    steps, layers = steps_of(asked), asked.layers
    held: set[int] = set()
    count: dict[int, int] = {}
    last: dict[int, tuple[int, int]] = {}
    got = [0, 0]
    for step, keys in enumerate(steps):
        if asked.start_N[step]:
            held = set() if asked.empty else held
            count = {} if asked.empty or policy == INFINITY else count
        got[asked.group_N[step]] += len(held & set(keys))
        row = asked.key_NK[step].tolist()
        for key in keys:
            count[key] = count.get(key, 0) + 1
            last[key] = (step, row.index(key))

        def worth(key: int, step: int = step, count: dict[int, int] = count) -> tuple[float, ...]:
            layer = int(asked.layer_C[key])
            if policy == LFU:
                return (count.get(key, 0), *last[key])
            if policy == INFINITY:
                return (count.get(key, 0) * (1 - layer / layers), *last[key])
            if policy == PROTECTED:
                return (0 <= layer - step % layers < 3, *last[key])
            if policy == BELADY:
                return (-next((at for at in range(step + 1, len(steps)) if key in steps[at]), len(steps)), *last[key])
            return last[key]

        for key in keys:
            if key not in held and len(held) == size:
                held.remove(min(held - set(keys), key=worth))
            held.add(key)
    return got


@given(requests(), st.sampled_from(POLICIES))
@settings(max_examples=200, deadline=None)
def test_all_sizes_at_once_are_what_one_cache_after_the_other_finds(asked: Requests, policy: str) -> None:
    least, keys = asked.key_NK.shape[1], len(asked.layer_C)
    got_GC = hits(asked, policy)
    for size in range(least, keys + 1):
        assert got_GC[:, size].tolist() == simulated(asked, policy, size)


@given(requests())
@settings(max_examples=100, deadline=None)
def test_lru_is_an_ordered_dict(asked: Requests) -> None:
    got_C = hits(asked, LRU).sum(0)
    for size in range(asked.key_NK.shape[1], len(asked.layer_C) + 1):
        held: OrderedDict[int, None] = OrderedDict()
        found_there = 0
        for step, keys in enumerate(steps_of(asked)):
            if asked.empty and asked.start_N[step]:
                held.clear()
            found_there += len(held.keys() & set(keys))
            for key in keys:
                held[key] = None
                held.move_to_end(key)
            while len(held) > size:
                held.popitem(last=False)
        assert got_C[size] == found_there


@given(requests(most=9), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_no_choice_of_what_to_evict_finds_more_than_belady(asked: Requests, beyond: int) -> None:
    size = asked.key_NK.shape[1] + beyond
    best = {frozenset[int](): 0}
    for step, keys in enumerate(steps_of(asked)):
        after: dict[frozenset[int], int] = {}
        for held, count in best.items():
            before = frozenset() if asked.empty and asked.start_N[step] else held
            others = sorted(before - set(keys))
            room = min(size - len(keys), len(others))
            for kept in combinations(others, room):
                state = frozenset(keys) | set(kept)
                after[state] = max(after.get(state, 0), count + len(before & set(keys)))
        best = after
    sizes = len(asked.layer_C)
    assert hits(asked, BELADY).sum(0)[min(size, sizes)] == max(best.values())


def test_in_a_loop_that_is_too_long_lru_finds_nothing_and_belady_does() -> None:
    keys = np.array([[0], [1], [2], [0], [1], [2], [0], [1]], np.int32)
    asked = Requests(keys, np.zeros(3, np.int64), np.arange(8) == 0, np.zeros(8, np.int64), 1)
    assert hits(asked, BELADY)[0, 2] == 3
    assert hits(asked, LRU)[0, 2] == 0


@pytest.mark.parametrize(
    ("experts", "top_k", "lru", "belady"),
    [
        (8, 2, {2: 0.245, 3: 0.369, 4: 0.496, 6: 0.751}, {2: 0.245, 3: 0.513, 4: 0.673, 6: 0.877}),
        (64, 8, {8: 0.124, 16: 0.251, 32: 0.501}, {8: 0.124, 16: 0.487, 32: 0.762}),
    ],
)
def test_random_routing_finds_what_was_published_here(
    experts: int, top_k: int, lru: dict[int, float], belady: dict[int, float]
) -> None:
    """The numbers were computed once from fewer draws; the closed form of LRU is exact."""
    tokens = 20_000
    like = trace(np.zeros((1, tokens, top_k)), experts)
    drawn = drawn_like(like, like.layers, tokens * experts, seed=1)
    rates = {policy: found(drawn, policy, **BOTH).sum((0, 1)) / requested(drawn).sum() for policy in POLICIES}
    for size, golden in lru.items():
        for policy in (LRU, LFU, PROTECTED, INFINITY):
            assert rates[policy][size] == pytest.approx(size / experts, abs=0.004)
        assert rates[LRU][size] == pytest.approx(golden, abs=0.008)
        assert chance(like, LRU, np.ones(1), **BOTH, seed=0)[size] == pytest.approx(size / experts, abs=1e-4)
    for size, golden in belady.items():
        assert rates[BELADY][size] == pytest.approx(golden, abs=0.008)
        assert chance(like, BELADY, np.ones(1), **BOTH, seed=0)[size] == pytest.approx(rates[BELADY][size], abs=0.004)


@pytest.mark.parametrize(("experts", "top_k", "lengths"), [(3, 1, [4, 0]), (4, 2, [3]), (3, 2, [1, 3]), (2, 2, [2])])
@pytest.mark.parametrize("policy", [LRU, LFU, INFINITY])
def test_random_routing_while_a_cache_fills_is_the_mean_over_all_routings(
    policy: str, experts: int, top_k: int, lengths: list[int]
) -> None:
    tokens, total, number = sum(lengths), np.zeros(experts + 1), 0
    for chosen in product(combinations(range(experts), top_k), repeat=tokens):
        drawn = trace(np.array([chosen]), experts, lengths=lengths)
        total += found(drawn, policy, one=False, empty=True).sum((0, 1)) / (tokens * top_k)
        number += 1
    got = chance(drawn, policy, np.ones(1), one=False, empty=True, seed=0)
    assert got[top_k:] == pytest.approx((total / number)[top_k:])
    one_run = chance(drawn, policy, np.ones(1), one=False, empty=False, seed=0)
    assert (one_run >= got - 1e-12).all() and static_chance(drawn, np.ones(1))[top_k] == top_k / experts


@given(traces(), st.booleans(), st.sampled_from(["layer", "global"]))
@settings(max_examples=40, deadline=None)
def test_a_finding_adds_up(traced: RoutingTrace, fresh: bool, scope: str) -> None:
    finding = run(traced, Options(fresh=fresh, scope=scope, expert_mb=10, gb_per_s=5, dense_ms=2))
    experts = traced.layers[0].point.num_experts
    asked = sum(len({int(e) for e in row if e >= 0}) for routed in traced.layers for row in routed.index_TK)
    assert finding.detail["requests_per_token"] == pytest.approx(asked / len(traced))
    for row in finding.rows:
        policy, size, held, rate, null, beyond, missed, bytes_, speed, needed = row
        assert held == pytest.approx(len(traced.layers) * size / 100)
        assert 0 <= rate <= finding.detail["hit_rate"][policy][experts] + 1e-12
        assert beyond == pytest.approx(rate - null)
        assert missed == pytest.approx(asked / len(traced) * (1 - rate))
        assert bytes_ == pytest.approx(10 * missed)
        assert speed == pytest.approx(1000 / (2 + 2 * missed))
        reached = [at for at, each in enumerate(finding.detail["hit_rate"][policy]) if each >= 0.9]
        assert needed == (reached[0] if reached else None)
        if policy not in (BELADY, STATIC):
            assert rate <= finding.detail["hit_rate"][BELADY][size] + 1e-12
    assert json.loads(json.dumps([finding.rows, finding.detail]))
    for curve in finding.curves:
        assert all(len(line) == len(curve.x) for line in curve.lines.values())
        assert curve.chance in curve.lines


def test_static_holds_what_the_other_half_used_most() -> None:
    """Documents 0 and 2 ask for 0 and 1, document 1 for 1 and 2, document 3 for 2 and 3."""
    index = [[[0, 1]] * 4 + [[1, 2]] * 4 + [[0, 1]] * 4 + [[2, 3]] * 4]
    finding = run(trace(index, 4, lengths=[4, 4, 4, 4]), Options(sizes="2,3,4"))
    assert finding.detail["hit_rate"][STATIC] == [0, 0, 4 / 16, 12 / 16, 1]


def test_one_cache_gives_room_to_the_layer_that_needs_it() -> None:
    index = [[[step % 4] for step in range(40)], [[0]] * 40]
    apart = run(trace(index, 4), Options(sizes="2")).detail["hit_rate"]
    together = run(trace(index, 4), Options(sizes="2", scope="global")).detail["hit_rate"]
    assert apart[LRU][2] == pytest.approx(39 / 80)
    assert together[BELADY][2] > apart[BELADY][2]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_with_empty_caches_a_document_is_as_good_as_alone(scope: str) -> None:
    """So the documents of a domain, and in caches of a layer that layer, find what they find without the others."""
    traced = random_trace(8, [20, 5, 0, 30, 10, 25], 8, 2, domains=3, layers=2)
    options = Options(sizes="3,5", scope=scope, fresh=True)
    detail = run(traced, options).detail
    hits_alone = dict.fromkeys(detail["hit_rate"], 0.0)
    for document in range(6):
        mask_T = traced.tokens.document_T == document
        if mask_T.any():
            for policy, rates in run(traced.where(mask_T), options).detail["hit_rate"].items():
                hits_alone[policy] += rates[5] * mask_T.sum()
    for policy in (LRU, LFU, INFINITY, BELADY):
        assert detail["hit_rate"][policy][5] == pytest.approx(hits_alone[policy] / len(traced))
    for number, domain in enumerate(traced.tokens.domains):
        alone = run(traced.where(traced.tokens.domain_T == number), options).detail
        for policy, rates in detail["domains"][domain].items():
            assert rates == pytest.approx([alone["hit_rate"][policy][3], alone["hit_rate"][policy][5]])
        assert alone["domains"][domain] == detail["domains"][domain]
    if scope == "layer":
        for routed in traced.layers:
            alone = run(RoutingTrace(traced.tokens, (routed,)), options).detail
            assert alone["layers"][routed.point.label] == detail["layers"][routed.point.label]


def test_phases_domains_and_layers_are_told_apart() -> None:
    traced = random_trace(3, [30, 30, 40], 8, 2, domains=2)
    traced.tokens.phase_T[10:] = DECODE
    for phase, tokens in (("all", slice(None)), ("prefill", slice(0, 10)), ("decode", slice(10, None))):
        mask = np.zeros(100, bool)
        mask[tokens] = True
        got = run(traced, Options(phase=phase)).detail
        assert got["hit_rate"] == run(traced.where(mask), Options()).detail["hit_rate"]
    detail = run(traced, Options(sizes="4")).detail
    assert set(detail["domains"]) <= {"a", "b"}
    assert np.mean([each[LRU][0] for each in detail["layers"].values()]) == pytest.approx(detail["hit_rate"][LRU][4])
    with pytest.raises(InputError, match="no tokens"):
        run(traced.where(traced.tokens.phase_T == DECODE), Options(phase="prefill"))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_layers_of_other_sizes_share_a_finding(scope: str) -> None:
    wide, narrow = random_trace(6, [200], 8, 3).layers[0], random_trace(7, [200], 5, 2)
    traced = RoutingTrace(narrow.tokens, (wide, narrow.layers[1]))
    detail = run(traced, Options(scope=scope)).detail
    for rates in detail["hit_rate"].values():
        assert np.all(np.diff(rates) >= -1e-12)
    for policy in (LRU, LFU, INFINITY, BELADY):
        assert detail["hit_rate"][policy][8] == pytest.approx(1 - (8 + 5) / (200 * (3 + 2)))
    if scope == "layer":
        assert detail["random"][LRU][4] == pytest.approx((3 * 4 / 8 + 2 * 4 / 5) / 5, abs=0.01)


def test_experts_that_compute_nothing_are_not_fetched() -> None:
    traced = random_trace(5, [50], 6, 2)
    point = traced.layers[0].point
    skips = Point(point.name, 0, 6, 2, null_experts=2)
    index_TK = traced.layers[0].index_TK
    got = run(RoutingTrace(traced.tokens, (Routed(skips, index_TK),)), Options(sizes="3")).detail
    dropped = Routed(Point(point.name, 0, 4, 2), np.where(index_TK < 4, index_TK, -1))
    assert got["hit_rate"] == run(RoutingTrace(traced.tokens, (dropped,)), Options(sizes="3")).detail["hit_rate"]


@pytest.mark.parametrize(
    "wrong", [{"sizes": "1"}, {"sizes": "9"}, {"sizes": "a"}, {"scope": "x"}, {"phase": "x"}, {"gb_per_s": 0}]
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(random_trace(0, [9], 8, 2), Options(**wrong))
