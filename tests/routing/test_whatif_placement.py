"""The what-if of placements: halves and domains by hand, what chance gives, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from small_traces import random_trace, rows, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.placement import loads
from moectl.routing.placement.loads import batch_loads, halves, part_loads
from moectl.routing.whatif.placement import Options, run, write_placement
from moectl.traces.trace import RoutingTrace


@settings(max_examples=40, deadline=None)
@given(traces())
def test_loads_are_what_counting_finds(found: RoutingTrace) -> None:
    half_T = halves(found.tokens)
    for number, routed in enumerate(found.layers):
        experts = routed.point.num_experts
        parts, batches = np.zeros((2, experts), int), np.zeros((len(found) // 3, experts), int)
        for token, (_, _, _, chosen) in enumerate(rows(found, number)):
            for expert in chosen:
                parts[half_T[token], expert] += 1
                if token // 3 < len(batches):
                    batches[token // 3, expert] += 1
        assert part_loads(routed, half_T, 2).tolist() == parts.tolist()
        assert batch_loads(routed, 3).tolist() == batches.tolist()


def test_loads_do_not_depend_on_how_much_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = random_trace(3, [40, 30], 6, 2).layers[0]
    part_T = np.random.default_rng(0).integers(0, 3, 70)
    before = part_loads(routed, part_T, 3), batch_loads(routed, 4)
    monkeypatch.setattr(loads, "_PIECE", 9)
    after = part_loads(routed, part_T, 3), batch_loads(routed, 4)
    assert all((one == other).all() for one, other in zip(before, after, strict=True))


def test_halves_are_documents_and_have_all_domains() -> None:
    found = random_trace(0, [3, 0, 4, 5, 2], 4, 1, domains=1)
    by_document = {int(d): set(halves(found.tokens)[found.tokens.document_T == d]) for d in found.tokens.document_T}
    assert by_document == {0: {0}, 2: {1}, 3: {0}, 4: {1}}
    alone = random_trace(0, [5], 4, 1)
    assert halves(alone.tokens).tolist() == [0, 0, 0, 1, 1]


def skewed() -> RoutingTrace:
    """Domain a uses experts 0 and 1, b uses 2 and 3, of four; two documents of each."""
    index = [[0], [1], [0], [1], [2], [3], [2], [3]]
    return trace([index], 4, lengths=[2, 2, 2, 2], domain_N=[0, 0, 1, 1], domains=("a", "b"))


def test_by_hand() -> None:
    found = run(skewed(), Options(gpus=2, replicas=0))
    layer = dict(zip(found.columns, found.rows[0], strict=True))
    assert (layer["contiguous"], layer["repacked"], layer["least without replicas"]) == (1.0, 1.0, 1.0)
    on_a = run(skewed(), Options(gpus=2, replicas=0, domain="a"))
    layer = dict(zip(on_a.columns, on_a.rows[0], strict=True))
    # Fitted on a, experts 0 and 1 are apart, and so are 2 and 3; judged on b, contiguous has both on one GPU.
    assert (layer["contiguous"], layer["repacked"]) == (2.0, 1.0)
    assert on_a.detail["transfer"]["a"]["b"] == 1.0
    assert on_a.detail["expert_gpu"] == [[0, 1, 0, 1]]


def test_judged_by_the_other_half() -> None:
    """One document uses experts 0 and 1, the other expert 0 alone."""
    found = run(trace([[[0], [1], [0], [0]]], 4, lengths=[2, 2]), Options(gpus=2, replicas=0))
    assert found.detail["imbalance"]["repacked"] == 2.0
    assert found.detail["transfer"] == {"all": {"all": 2.0}}


def test_fair_routing_is_what_chance_gives() -> None:
    generator = np.random.default_rng(5)
    index = np.argsort(generator.random((6, 4000, 16)), axis=2)[..., :4]
    found = run(trace(index, 16, lengths=[500] * 8), Options(gpus=4, replicas=4))
    mean = dict(zip(found.columns, next(row for row in found.rows if row[0] == "mean"), strict=True))
    for policy in ("contiguous", "repacked"):
        assert mean[policy] - 1 == pytest.approx(mean["chance"] - 1, rel=0.5)
    assert mean["chance"] < 1.05


def test_curves_go_through_the_table() -> None:
    found = run(random_trace(2, [30] * 6, 8, 2, domains=2), Options(gpus=4, replicas=4, seed=1))
    mean = dict(zip(found.columns, next(row for row in found.rows if row[0] == "mean"), strict=True))
    for curve, at in zip(found.curves, (4, 4), strict=True):
        place = list(curve.x).index(at)
        for policy in ("contiguous", "repacked", "replicated"):
            assert curve.lines[policy][place] == pytest.approx(mean[policy])
    assert all(len(row) == len(found.columns) for row in found.rows)


@settings(max_examples=15, deadline=None)
@given(traces(least_tokens=2))
def test_any_trace(found: RoutingTrace) -> None:
    got = run(found, Options(gpus=3, replicas=1))
    layers = len(found.layers)
    values = [cell for row in got.rows[: layers + 1] for cell in row[1:]] + [row[3] for row in got.rows[layers + 1 :]]
    assert all(isinstance(value, float) and np.isfinite(value) and value >= 1 - 1e-9 for value in values)
    json.dumps(dict(got.detail))


def test_written_for_an_engine(tmp_path: Path) -> None:
    found = run(random_trace(2, [30] * 6, 8, 2), Options(gpus=4, replicas=4))
    said = write_placement(tmp_path / "placement.json", found, "sglang")
    written = json.loads((tmp_path / "placement.json").read_text())["physical_to_logical_map"]
    assert written == found.detail["slots"]
    assert "--ep-num-redundant-experts 4" in said


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="no domain 'x'"):
        run(skewed(), Options(domain="x"))
    with pytest.raises(InputError, match="0 tokens"):
        run(random_trace(0, [0], 4, 1), Options())
