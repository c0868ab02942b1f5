"""Bytes between GPUs and experts read by a batch, against sets of Python; their chance against the reference's."""

from __future__ import annotations

import json
from itertools import pairwise
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import home_of, random_trace, rows, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.whatif import all_to_all, coalescing
from moectl.routing.whatif.chance import groups_met
from moectl.traces.trace import DECODE, RoutingTrace


def test_chance_is_what_is_known_of_deepseek_v3() -> None:
    """8 of 256 experts on 8 nodes and 32 GPUs: D (1 - C(E - E/D, k) / C(E, k))."""
    share_J = (0.0,) * 8 + (1.0,)
    assert groups_met(256, [32] * 8, share_J) == pytest.approx(5.2947, abs=5e-5)
    assert groups_met(256, [32] * 8, share_J) == pytest.approx(8 * (1 - comb(224, 8) / comb(256, 8)), rel=1e-12)
    assert groups_met(256, [8] * 32, share_J) == pytest.approx(7.27, abs=5e-3)
    assert groups_met(256, [1] * 256, share_J) == pytest.approx(8)


def test_random_routing_goes_where_chance_says() -> None:
    index_TK = np.argsort(np.random.default_rng(0).random((20_000, 64)), axis=1)[:, :8]
    traced = trace(index_TK[None], 64, lengths=[200] * 100)
    found = all_to_all.run(traced, all_to_all.Options(gpus=16, gpus_per_node=2))
    row = dict(zip(found.columns, found.rows[0], strict=True))
    assert row["nodes"] == pytest.approx(row["nodes by chance"], rel=0.01)
    assert row["GPUs"] == pytest.approx(row["GPUs by chance"], rel=0.01)
    assert row["kB to other nodes"] == pytest.approx(row["by chance"], rel=0.01)
    curve = found.curves[0]
    assert curve.x == [1, 2, 4, 8, 16, 32, 64]
    np.testing.assert_allclose(curve.lines["this trace"], curve.lines["random routing"], rtol=0.01)
    assert curve.lines["this trace"][3] == pytest.approx(row["nodes"])


@given(traces(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["document", "round-robin"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_traffic_is_what_sets_give(
    tmp_path_factory: pytest.TempPathFactory, traced: RoutingTrace, nodes: int, each: int, home: str, placed: bool
) -> None:
    gpus, experts = nodes * each, traced.layers[0].point.num_experts
    gpu = [
        [home_of(e, experts, gpus) if gpus <= experts else e * gpus // experts for e in range(experts)]
        for _ in traced.layers
    ]
    file = ""
    if placed:
        gpu = np.random.default_rng(0).integers(0, gpus, (len(traced.layers), experts)).tolist()
        path = tmp_path_factory.mktemp("placement") / "found.json"
        path.write_text(json.dumps({"what_if": {"decoder": [{"detail": {}}, {"detail": {"expert_gpu": gpu}}]}}))
        file = str(path)
    options = all_to_all.Options(gpus, each, 1000, 1, home, file)
    found = all_to_all.run(traced, options)
    for layer in range(len(traced.layers)):
        sums = np.zeros(6)
        for token, (document, _, _, experts_of) in enumerate(rows(traced, layer)):
            own = (document if home == "document" else token) % gpus
            to = [gpu[layer][expert] for expert in experts_of]
            on = [there // each for there in to]
            sums += [
                len(set(to)),
                len(set(on)),
                len(set(to) - {own}),
                len(set(on) - {own // each}),
                sum(there != own for there in to),
                sum(there != own // each for there in on),
            ]
        per = sums / len(traced)
        row = found.rows[layer]
        assert [row[3], row[1]] == pytest.approx(per[:2])
        assert [row[8], row[5], row[9], row[7]] == pytest.approx(per[2:])


def test_messages_between_nodes_are_fewer_and_larger() -> None:
    traced = random_trace(0, [50, 50], 8, 2)
    found = all_to_all.run(traced, all_to_all.Options(8, 4, 1000, 1, batch_tokens=100))
    messages = found.detail["messages"]
    assert (messages["flat messages"], messages["hierarchical messages"]) == (2 * 1 * 16, 2)
    row = dict(zip(found.columns, found.rows[-1], strict=True))
    total = row["with a copy per expert"] * 1000 * 100
    assert messages["flat bytes"] * 32 == pytest.approx(total) == pytest.approx(messages["hierarchical bytes"] * 2)


def test_on_one_node_the_bytes_are_those_between_gpus() -> None:
    found = all_to_all.run(random_trace(0, [50, 50], 8, 2), all_to_all.Options(8, 8, 1000, 1))
    row = dict(zip(found.columns, found.rows[-1], strict=True))
    assert f"takes {row['kB to other GPUs']:.1f} kB between GPUs" in found.headline and "node" not in found.headline
    assert not any("0 messages" in text for text in found.assumptions)


@pytest.mark.parametrize(
    "content", ["", "[3]", '{"detail": 3}', '{"expert_gpu": [[0, 0, 9]]}', '{"expert_gpu": [[0], [[1]]]}', "{}"]
)
def test_a_placement_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"placement\.json"):
        all_to_all.run(random_trace(0, [5], 3, 1, layers=1), all_to_all.Options(2, 1, placement=str(path)))
    with pytest.raises(UsageError, match="whole number"):
        all_to_all.Options(gpus=6, gpus_per_node=4)


@given(traces(), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_experts_read_are_what_sets_give(traced: RoutingTrace, batch: int, seed: int) -> None:
    tokens, everyone = traced.tokens, np.arange(len(traced))
    documents = [np.flatnonzero(tokens.document_T == number).tolist() for number in range(len(tokens.domain_N))]
    drafts = [own[at : at + batch] for own in documents for at in range(0, len(own) - batch + 1, batch)]
    together = coalescing.together(tokens, everyone, batch, seed)
    if len(np.unique(tokens.document_T)) >= batch:
        assert together.shape == (len(traced) // batch, batch) and len(np.unique(together)) == together.size
        slots = [tokens.document_T[slot].tolist() for slot in together.T]
        assert all(len({*slot}) == 1 + sum(a != b for a, b in pairwise(slot)) for slot in slots)
    else:
        assert not len(together)
    assert coalescing.consecutive(tokens, everyone, batch).tolist() == drafts
    for layer, routed in enumerate(traced.layers):
        of = [set(experts) for *_, experts in rows(traced, layer)]
        for steps in (together.tolist(), drafts):
            expected = np.mean([len(set().union(*(of[token] for token in step))) for step in steps]) if steps else None
            got = coalescing.distinct(
                routed.index_TK, np.array(steps, np.int64).reshape(-1, batch), routed.point.num_experts
            )
            assert got == (None if expected is None else pytest.approx(expected))


def test_independent_tokens_read_what_chance_says_and_sticky_ones_less() -> None:
    generator = np.random.default_rng(0)
    free_TK = np.argsort(generator.random((12_800, 64)), axis=1)[:, :8]
    sticky_TK = np.repeat(free_TK[::8], 8, axis=0)
    found = coalescing.run(trace([free_TK, sticky_TK], 64, lengths=[200] * 64), coalescing.Options(batch=16, draft=4))
    free, sticky = (dict(zip(found.columns, row, strict=True)) for row in found.rows[:2])
    assert free["by chance"] == pytest.approx(64 * (1 - (7 / 8) ** 16))
    assert free["experts read"] == pytest.approx(free["by chance"], rel=0.01)
    assert free["by 4 consecutive tokens"] == pytest.approx(free["those by chance"], rel=0.01)
    assert sticky["experts read"] == pytest.approx(free["by chance"], rel=0.01)
    assert sticky["by 4 consecutive tokens"] == 8
    assert free["MB a step"] == pytest.approx(12.6 * free["experts read"])
    assert found.curves[0].x[-1] == 512 and found.curves[0].lines["documents at once"][-1] is None


def test_uneven_loads_read_less_than_even_ones_and_decoded_tokens_are_preferred() -> None:
    generator = np.random.default_rng(0)
    index_TK = np.minimum(generator.geometric(0.3, (6400, 1)) - 1, 15)
    traced = trace(index_TK[None], 16, lengths=[100] * 64, domain_N=[0, 1] * 32, domains=("a", "b"))
    row = dict(zip(*(lambda f: (f.columns, f.rows[0]))(coalescing.run(traced, coalescing.Options())), strict=True))
    assert (
        row["experts read"] == pytest.approx(row["same loads"], rel=0.02) and row["same loads"] < row["by chance"] - 3
    )
    assert set(coalescing.run(traced, coalescing.Options()).detail["domains"]) == {"a", "b"}
    traced.tokens.phase_T[traced.tokens.position_T >= 90] = DECODE
    index_TK[traced.tokens.position_T >= 90] = 3
    decoded = coalescing.run(trace_like(traced, index_TK), coalescing.Options())
    assert decoded.rows[0][1] == 1 and "decoded" in decoded.assumptions[0]


def trace_like(traced: RoutingTrace, index_TK: np.ndarray) -> RoutingTrace:
    """The same tokens with other experts."""
    made = trace(index_TK[None], traced.layers[0].point.num_experts)
    return RoutingTrace(traced.tokens, made.layers)
