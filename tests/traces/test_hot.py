"""Coverage of the busiest experts and their similarity, against loops and float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import rows, trace, traces

from moectl.errors import InputError
from moectl.traces.hot import coverage, needed, slots
from moectl.traces.similarity import rows_similarity, similarity
from moectl.traces.statistics import statistics_of
from moectl.traces.trace import RoutingTrace


@given(traces())
@settings(max_examples=60, deadline=None)
def test_coverage_is_what_counting_gives(traced: RoutingTrace) -> None:
    seen: Counter[int] = Counter()
    half = []
    for domain in traced.tokens.domain_N:  # documents of a domain are dealt to the halves in turn
        half.append(seen[domain] % 2)
        seen[domain] += 1
    for layer, got in enumerate(coverage(statistics_of(traced))):
        halves = [Counter(), Counter()]
        for document, _, _, experts in rows(traced, layer):
            halves[half[document]].update(experts)
        counts = [(halves[0] + halves[1])[expert] for expert in range(len(got.share_E))]
        total = sum(counts)
        for number in range(len(counts)):
            covered = sum(sorted(counts, reverse=True)[: number + 1])
            assert got.share_E[number] == pytest.approx(covered / total if total else 0)
        if not (halves[0] and halves[1]):
            assert got.held_out_E is None
            continue
        for number in range(len(counts)):
            covered = 0
            for fitted, tried in (halves, halves[::-1]):
                kept = sorted(range(len(counts)), key=lambda expert: (-fitted[expert], expert))[: number + 1]
                covered += sum(tried[expert] for expert in kept)
            assert got.held_out_E[number] == pytest.approx(covered / total)


def test_experts_that_are_hot_in_one_half_only_do_not_count_as_hot() -> None:
    index = [[[document] for document in range(8) for _ in range(10)]]
    [got] = coverage(statistics_of(trace(index, 8, lengths=[10] * 8)))
    assert got.share_E[3] == 0.5
    assert got.held_out_E[3] == 0


@given(traces())
@settings(max_examples=60, deadline=None)
def test_slots_are_what_counting_gives(traced: RoutingTrace) -> None:
    got = slots(traced)
    layers = range(len(traced.layers))
    assert got.total == sum(routed.point.num_experts for routed in traced.layers)
    assert (got.tokens_S[0], got.tokens_S[-1]) == (1, len(traced))
    for step, number in enumerate(got.tokens_S):
        used = {(layer, expert) for layer in layers for row in list(rows(traced, layer))[:number] for expert in row[3]}
        assert got.used_S[step] == len(used)
        points = [routed.point for routed in traced.layers]
        fair = sum(p.num_experts - p.num_experts * (1 - p.top_k / p.num_experts) ** int(number) for p in points)
        assert got.fair_S[step] == pytest.approx(fair)
    loads = [Counter(expert for row in rows(traced, layer) for expert in row[3]) for layer in layers]
    highest = max(
        max(load.values(), default=0) * routed.point.num_experts / max(sum(load.values()), 1)
        for load, routed in zip(loads, traced.layers, strict=True)
    )
    assert got.hottest == pytest.approx(highest)


@given(traces(), st.sampled_from([0.31, 0.43, 0.87]))
@settings(max_examples=60, deadline=None)
def test_the_expert_that_crosses_the_threshold_is_needed(traced: RoutingTrace, mass: float) -> None:
    for layer, got in enumerate(needed(traced, mass)):
        numbers = []
        for score in traced.layers[layer].score_TE.astype(float):
            if got.point.score_kind == "logits":
                score = [math.exp(s) if got.point.scoring == "softmax" else 1 / (1 + math.exp(-s)) for s in score]
            held, number = 0.0, 0
            for p in sorted((s / sum(score) for s in score), reverse=True):
                if held >= mass - 1e-12:
                    break
                held, number = held + p, number + 1
            numbers.append(number)
        assert got.mean == pytest.approx(np.mean(numbers))
        for name, mean in got.domains.items():
            own = traced.tokens.domain_T == traced.tokens.domains.index(name)
            assert mean == pytest.approx(np.mean(np.array(numbers)[own]))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="NaN or infinity, first at token 1"):
        needed(trace([[[0], [0]]], 2, score_LTE=np.array([[[0.0, 0.0], [np.nan, 0.0]]])))
    assert needed(trace([[[0]]], 2)) == []


@pytest.mark.parametrize("held", [1, 2, 3, 7, 100])
def test_cosines_are_those_of_float64(held: int) -> None:
    generator = np.random.default_rng(0)
    weight = (generator.normal(0, 1, (1, 12, 10)) + 0.3 * generator.normal(0, 1, (7, 12, 10))).astype(np.float32)
    got = similarity(lambda expert: weight[expert], 7, held)
    flat = weight.reshape(7, -1).astype(np.float64)
    for found, matrix in ((got.cosine_EE, flat), (got.centred_EE, flat - flat.mean(0))):
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        assert found == pytest.approx(unit @ unit.T, abs=1e-6)
        assert found != pytest.approx(unit @ unit.T + 1e-5, abs=1e-6)
    assert got.cosine_EE[0, 1] > 0.8 and abs(got.centred_EE[0, 1]) < 0.4
    assert got.spread == pytest.approx(1 / math.sqrt(120))


def test_what_copies_differ_in_is_seen_however_small_and_copies_alone_have_no_direction() -> None:
    generator = np.random.default_rng(0)
    dense, change = generator.normal(size=(2, 5000)).astype(np.float64)
    weight = np.stack([dense, dense, dense + 1e-4 * change, dense + 1e-4 * change])
    got = similarity(lambda expert: weight[expert], 4)
    sign = np.array([1, 1, -1, -1])
    assert got.cosine_EE == pytest.approx(np.ones((4, 4)), abs=1e-6)
    assert got.centred_EE == pytest.approx(np.outer(sign, sign), abs=1e-2)
    same = rows_similarity(np.ones((3, 5)))
    assert (same.centred_EE == 0).all() and same.cosine_EE == pytest.approx(np.ones((3, 3)))


def test_an_expert_of_zeros_is_like_none() -> None:
    weight = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    got = rows_similarity(weight).cosine_EE
    assert got[0].tolist() == [0, 0, 0]
    assert got[1, 2] == pytest.approx(math.sqrt(0.5))
    assert rows_similarity(weight[:1]).cosine_EE.tolist() == [[0]]


def test_experts_are_read_a_few_at_a_time() -> None:
    alive: set[int] = set()
    most = 0

    class Watched(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def read(expert: int) -> np.ndarray:
        nonlocal most
        found = np.full(4, float(expert)).view(Watched)
        alive.add(id(found))
        most = max(most, len(alive))
        return found

    similarity(read, 20, held=4)
    assert most <= 2
