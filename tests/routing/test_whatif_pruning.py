"""What pruning and skipping lose, against counting token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, rows, trace, traces

from moectl.errors import UsageError
from moectl.routing.masks import parse
from moectl.routing.whatif.pruning import Options, run
from moectl.traces.trace import RoutingTrace


@given(traces(), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from(["weight", "count"]))
@settings(max_examples=100, deadline=None)
def test_what_is_lost_is_what_counting_gives(traced: RoutingTrace, removed: float, by: str) -> None:
    found = run(traced, Options(removed, by))
    for layer, routed in enumerate(traced.layers):
        experts, top_k = routed.point.num_experts, routed.point.top_k
        use = {(domain, expert): 0.0 for domain in range(3) for expert in range(experts)}
        for token, (_, domain, *_) in enumerate(rows(traced, layer)):
            for rank, expert in enumerate(routed.index_TK[token].tolist()):
                if expert >= 0:
                    use[domain, expert] += float(routed.weight_TK[token, rank]) if by == "weight" else 1
        number = round(removed * experts)
        total = [sum(use[domain, expert] for domain in range(3)) for expert in range(experts)]
        gone = set(sorted(range(experts), key=lambda expert: (total[expert], expert))[:number])
        row = dict(zip(found.columns, found.rows[layer], strict=True))
        assert row["removed"] == number
        assert row["mass lost"] == pytest.approx(sum(total[expert] for expert in gone) / max(sum(total), 1e-300))
        lost = [len(gone & set(own)) for *_, own in rows(traced, layer)]
        all_ = [bool(own) and gone >= set(own) for *_, own in rows(traced, layer)]
        assert row["tokens losing some"] == pytest.approx(np.mean([number > 0 for number in lost]))
        assert row["tokens losing all"] == pytest.approx(np.mean(all_))
        share = found.detail["tokens losing 0, 1, ..."][str(layer)]
        assert share[0] == pytest.approx(np.mean([number == 0 for number in lost]))
        assert len(share) == top_k + 2 and sum(share) == pytest.approx(1)
        for domain, name in enumerate(traced.tokens.domains):
            own = sum(use[domain, expert] for expert in range(experts))
            if own and row["worst domain"] == name:
                assert row["worst domain's"] == pytest.approx(sum(use[domain, expert] for expert in gone) / own)


def test_domains_keep_their_own_experts() -> None:
    """Two domains with two experts each, that share none: each loses all of its own with the other's."""
    index_TK = np.array([[0], [1]] * 50 + [[2], [3]] * 30)
    traced = trace(index_TK[None], 4, lengths=[100, 60], domain_N=[0, 1], domains=("a", "b"))
    found = run(traced, Options(removed=0.5))
    assert found.rows[0][2] == pytest.approx(60 / 160) and found.rows[0][4:6] == (1.0, "b")
    assert found.detail["kept by both"] == {"a": {"a": 1, "b": 0}, "b": {"a": 0, "b": 1}}
    assert found.detail["lost in the column, kept for the row"] == {"a": {"a": 0, "b": 1}, "b": {"a": 1, "b": 0}}
    mask = parse(found.detail["mask"])
    assert mask.named == {"0": {2, 3}}
    lines = found.curves[0].lines
    assert lines["least used experts"][8] == pytest.approx(60 / 160)
    assert lines["random experts"][8] == 0.5 and lines["least used of another domain"][8] == 1
    assert "not unimportant" in found.headline and any("--mask" in each for each in found.assumptions)


def test_least_used_experts_lose_the_least() -> None:
    traced = random_trace(3, [200], 6, 2)
    lines = run(traced, Options()).curves[0].lines
    pairs = zip(lines["least used experts"], lines["random experts"], strict=True)
    assert all(least <= random + 1e-12 for least, random in pairs)


def test_half_of_all_second_choices_are_below_the_median_ratio() -> None:
    generator = np.random.default_rng(0)
    ratio_T = generator.random(1001)
    weight_TK = np.stack([np.ones(1001), ratio_T], 1)
    weight_TK[::2] = weight_TK[::2, ::-1]  # the router's order need not be that of the weights
    index_TK = np.tile([1, 2], (1001, 1))
    traced = trace(
        index_TK[None], 4, weight_LTK=weight_TK[None], lengths=[501, 500], domain_N=[0, 1], domains=("a", "b")
    )
    found = run(traced, Options())
    row = dict(zip(found.columns, found.rows[0], strict=True))
    half = np.sort(ratio_T.astype(np.float16))
    assert found.detail["beta"]["0"] == pytest.approx(np.median(half))
    assert row["choices skipped"] == pytest.approx(0.25, abs=0.002)
    skipped = half[half < np.median(half)].astype(float)
    assert row["their weight"] == pytest.approx(skipped.sum() / (1001 + half.astype(float).sum()), rel=1e-4)
    assert run(traced, Options(beta=2)).rows[0][8] == pytest.approx(0.5)
    assert found.detail["domains"]["a"]["skipped"] == pytest.approx(
        np.mean(ratio_T[:501] < np.median(half)) / 2, abs=0.01
    )


def test_a_trace_without_weights_is_counted() -> None:
    bare = trace(np.array([[[0, 1]]] * 1).repeat(4, 1), 3)
    found = run(bare, Options(removed=0.34))
    assert "0.0% of the assignments are lost" in found.headline
    row = found.rows[0]
    assert row[1:4] == (1, 0.0, pytest.approx(1 / 3)) and row[8] is None
    for wrong in ({"removed": 1.0}, {"by": "size"}, {"beta": -1}):
        with pytest.raises(UsageError):
            Options(**wrong)
