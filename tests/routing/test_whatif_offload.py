"""Splits against every split there is, the buffer against its description, and when fetching wins."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, rows, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.whatif.eviction import BELADY, LRU
from moectl.routing.whatif.offload import BATCHES, BUFFER, RANDOM, Options, run
from moectl.routing.whatif.splitting import FETCHED, LONGER, ON_CPU, SUM, batches, buffered, costs, serial
from moectl.traces.trace import RoutingTrace


def batches_of(traced: RoutingTrace, size: int, layer: int = 0) -> list[list[int]]:
    """The experts that the tokens of each batch are sent to, with repetitions."""
    found: list[list[int]] = []
    document, number = -1, 0
    for at, _, _, experts in rows(traced, layer):
        if at != document or number == size:
            document, number = at, 0
            found.append([])
        found[-1] += experts
        number += 1
    return found


@given(traces(), st.integers(1, 8), st.sampled_from([(7.0, 70.0), (1.0, 2.5), (3.0, 0.0)]), st.integers(0, 63))
@settings(max_examples=100, deadline=None)
def test_no_split_is_better(traced: RoutingTrace, size: int, prices: tuple[float, float], pins: int) -> None:
    cpu, copy = prices
    experts = traced.layers[0].point.num_experts
    pinned = np.array([bool(pins >> e & 1) for e in range(experts)])
    batch_T = batches(traced.tokens.document_T, size)
    got, taken, on_cpu = costs(traced.layers[0].index_TK, batch_T, pinned, cpu, copy)
    expected, there = np.zeros(4), 0
    for chosen in batches_of(traced, size):
        count = [chosen.count(e) for e in range(experts)]
        there += sum(number > 0 for number in count)
        missing = [number for e, number in enumerate(count) if number and not pinned[e]]
        sides = []
        for fetched in product([False, True], repeat=len(missing)):
            on_gpu = copy * sum(fetched)
            sides.append((on_gpu, cpu * sum(n for n, there in zip(missing, fetched, strict=True) if not there)))
        expected[FETCHED] += copy * len(missing)
        expected[ON_CPU] += cpu * sum(missing)
        expected[SUM] += min(sum(side) for side in sides)
        expected[LONGER] += min(max(side) for side in sides)
    assert got.tolist() == pytest.approx(expected.tolist())
    assert taken == there
    assert 0 <= cpu * on_cpu <= got[SUM] + 1e-9


@given(traces(), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_the_buffer_is_what_the_paper_says(traced: RoutingTrace, size: int, room: int) -> None:
    experts = traced.layers[0].point.num_experts
    batch_T = batches(traced.tokens.document_T, size)
    key_R, batch_R = serial(traced.layers[0].index_TK, batch_T, experts)
    held: list[int] = []
    hits, expected = 0, []
    for number, chosen in enumerate(batches_of(traced, size)):
        for key in sorted(set(chosen)):
            expected.append((key, number))
            if key in held:
                hits += 1
                continue
            if len(held) == room:
                idle = [e for e in held if e not in chosen]
                held.remove(idle[-1] if idle else held[-1])
            held.append(key)
    assert list(zip(key_R.tolist(), batch_R.tolist(), strict=True)) == expected
    assert buffered(key_R, batch_R, experts, room) == hits


def test_the_example_of_the_paper() -> None:
    """4 experts, room for 2: experts 1, 2, 3 run in each batch; 2 leaves for 3, so 1 is there when the next begins."""
    key_R, batch_R = np.array([1, 2, 3] * 5, np.int32), np.repeat(np.arange(5), 3)
    assert buffered(key_R, batch_R, 4, 2) == 4
    index = [[[1], [2], [3]] * 20]
    detail = run(trace(index, 4, lengths=[30, 30]), Options(batch=3, resident=0.5)).detail["buffer"]
    at = detail["held"].index(2)
    assert detail[LRU][at] == 0
    assert detail[BUFFER][at] == pytest.approx(9 / 30)
    assert detail[BELADY][at] == pytest.approx(14 / 30)  # who looks ahead keeps 3 when 2 comes in


@given(traces(least_tokens=2), st.integers(1, 40), st.sampled_from([0, 0.2, 0.5, 1]))
@settings(max_examples=40, deadline=None)
def test_a_finding_adds_up(traced: RoutingTrace, batch: int, resident: float) -> None:
    finding = run(traced, Options(batch=batch, resident=resident))
    assert [row[0] for row in finding.rows] == sorted({*BATCHES, batch})
    for size, taken, _, fetched, cpu, split, longer, on_cpu, *found in finding.rows:
        assert 0 <= taken <= traced.layers[0].point.num_experts
        assert max(split / 2, 0) <= longer + 1e-9
        assert longer <= split + 1e-9 <= min(fetched, cpu) + 2e-9
        assert 0 <= on_cpu <= 1
        assert all(rate is None if size != batch else 0 <= rate <= 1 for rate in found)
    assert json.loads(json.dumps([finding.rows, finding.detail]))
    buffer = finding.detail["buffer"]
    for at in range(len(buffer["held"])):
        assert max(buffer[BUFFER][at], buffer[LRU][at]) <= buffer[BELADY][at] + 1e-12


def test_random_routing_changes_where_the_closed_form_has_it() -> None:
    generator = np.random.default_rng(0)
    index = np.argsort(generator.random((2, 4096, 16)), axis=2)[..., :2]
    finding = run(trace(index, 16, lengths=[2048, 2048]), Options(cpu_us_per_token=100, expert_mb=10, gb_per_s=25))
    for batch, taken, random, *_ in finding.rows:
        assert random == pytest.approx(16 * (1 - (7 / 8) ** batch), abs=1e-6)
        assert taken == pytest.approx(random, abs=0.35)
    # 4 tokens at an expert take as long as to fetch it: 64 (1 - (7/8)^B) <= 2 B from 31 on
    change = finding.detail["random_batch_from_which_fetching_wins"]
    assert 64 * (1 - (7 / 8) ** change) <= 2 * change
    assert 64 * (1 - (7 / 8) ** (change - 1)) > 2 * (change - 1)
    assert finding.detail["tokens_per_fetch"] == 4
    assert finding.detail["batch_from_which_fetching_wins"] == min(size for size in (*BATCHES, 32) if size >= change)
    wins = f"from batches of {finding.detail['batch_from_which_fetching_wins']} on"
    assert f"beats the CPU {wins} (random routing: {wins})" in finding.headline
    at = finding.detail["buffer"]["held"].index(8)
    assert finding.detail["buffer"][BUFFER][at] == pytest.approx(finding.detail["buffer"][RANDOM][at], abs=0.03)


def test_the_busiest_of_all_layers_are_pinned() -> None:
    """Of layer 0 the experts 0 and 1 are all that is asked for; of layer 1 all 4 are, equally."""
    index = [[[t % 2] for t in range(80)], [[t % 4] for t in range(80)]]
    finding = run(trace(index, 4, lengths=[40, 40]), Options(batch=4, resident=0.25, expert_mb=1, gb_per_s=1))
    batches_of_4 = next(row for row in finding.rows if row[0] == 4)
    assert batches_of_4[3] == pytest.approx(4 / 4)
    assert batches_of_4[4] == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"resident": -1}, {"resident": 1.1}, {"gb_per_s": 0}])
def test_what_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        run(random_trace(0, [9, 9], 8, 2), Options(**wrong))


def test_where_all_experts_are_on_the_gpu_there_is_nothing_to_fetch() -> None:
    finding = run(random_trace(0, [9, 9], 8, 2), Options(resident=1))
    assert "beats the CPU at none of the batches" in finding.headline
    assert all(row[3] == row[4] == 0 for row in finding.rows)


def test_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="one token"):
        run(random_trace(0, [1], 8, 2), Options())
