"""Balance against counting by hand, and against the published counts of OLMoE and Mixtral."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from expert_counts import MODELS
from hypothesis import given, settings
from small_traces import rows, trace, traces

from moectl.errors import InputError
from moectl.traces.balance import Balance, balance
from moectl.traces.change import difference
from moectl.traces.statistics import Load, RoutingStatistics, statistics_of
from moectl.traces.trace import Point, RoutingTrace

OLMOE = {
    "github": [(4.01, 0.961, 0.291, 21, 62.6), (5.16, 0.851, 0.584, 17, 77.0), (3.51, 0.853, 0.589, 30, 56.4)],
    "arxiv": [(6.81, 0.943, 0.317, 0, 97.7), (5.28, 0.866, 0.552, 17, 78.5), (6.49, 0.864, 0.562, 17, 93.7)],
    "c4": [(2.02, 0.990, 0.137, 41, 37.7), (1.66, 0.982, 0.212, 1, 33.2), (1.50, 0.968, 0.288, 7, 31.2)],
    "book": [(2.63, 0.966, 0.268, 28, 45.4), (3.06, 0.930, 0.414, 28, 50.7), (1.93, 0.926, 0.433, 45, 36.6)],
    "wikipedia": [(5.18, 0.939, 0.349, 11, 77.2), (5.78, 0.913, 0.449, 27, 84.8), (3.65, 0.829, 0.633, 36, 58.1)],
}
"""MaxVio, H / ln E, Gini, the busiest expert, % of tokens that use it; at layers 0, 7 and 15."""


def published(model: str) -> dict[str, list[Balance]]:
    """By domain the balance of the three layers."""
    described = MODELS[model]
    experts, top_k = described["num_experts"], described["top_k"]
    found = {}
    for domain, layers in described["domains"].items():
        loads = []
        for layer, counts in layers.items():
            point = Point(f"layers.{layer}", int(layer), experts, top_k)
            loads.append(Load(point, np.array([counts]).reshape(1, -1), np.zeros((1, experts), np.int64)))
        tokens = np.array([loads[0].count_E.sum() // top_k])
        found[domain] = balance(RoutingStatistics((domain,), np.zeros(1, np.int32), tokens, 102, tuple(loads)))
    return found


def test_the_published_table_of_olmoe() -> None:
    found = published("olmoe")
    assert found["c4"][0].tokens == 208_896
    table = {(domain, number): row for domain, layers in OLMOE.items() for number, row in enumerate(layers)}
    half_a_digit = np.array([5e-3, 5e-4, 5e-4, 0, 0.05]) + 1e-9
    for domain, layers in found.items():
        for number, got in enumerate(layers):
            row = np.array([got.max_vio, got.entropy, got.gini, got.busiest, 100 * got.busiest_share])
            assert [at for at, expected in table.items() if (abs(row - expected) <= half_a_digit).all()] == [
                (domain, number)
            ]


def test_mixtral_is_nearly_even_everywhere() -> None:
    every = [layer for layers in published("mistral").values() for layer in layers]
    for name, low, high in (("max_vio", 0.08, 0.33), ("entropy", 0.982, 0.9996), ("gini", 0.02, 0.12)):
        values = [getattr(got, name) for got in every]
        digits = 4 if name == "entropy" else 2
        assert low - 1e-3 <= round(min(values), digits) and round(max(values), digits) <= high
    assert 0.265 <= min(got.busiest_share for got in every) <= max(got.busiest_share for got in every) < 0.335


def by_hand(traced: RoutingTrace, layer: int, domain: int | None) -> dict[str, object]:
    """The numbers of a point, by loops over its tokens."""
    point = traced.layers[layer].point
    own = [row for row in rows(traced, layer) if domain is None or row[1] == domain]
    counts = Counter(expert for row in own for expert in row[3])
    load = [counts[expert] for expert in range(point.num_experts)]
    total, mean = sum(load), sum(load) / point.num_experts
    apart = sum(abs(one - other) for one, other in product(load, load))
    return {
        "tokens": len(own),
        "share": [count / total for count in load],
        "cv": math.sqrt(sum((count - mean) ** 2 for count in load) / len(load)) / mean,
        "gini": apart / (2 * len(load) ** 2 * mean),  # half the mean difference over the mean
        "nats": sum(-count / total * math.log(count / total) for count in load if count),
        "max_vio": max(load) / mean - 1,
        "busiest_share": sum(load.index(max(load)) in row[3] for row in own) / len(own),
        "unseen": tuple(expert for expert, count in enumerate(load) if not count),
        "dropped": sum(point.top_k - len(row[3]) for row in own) / (len(own) * point.top_k),
    }


@given(traces())
@settings(max_examples=60, deadline=None)
def test_every_number_is_what_counting_gives(traced: RoutingTrace) -> None:
    statistics = statistics_of(traced)
    for domain, name in enumerate([*traced.tokens.domains, None]):
        for layer, got in enumerate(balance(statistics, name)):
            if got.share_E.sum() == 0:
                row = got.cv, got.gini, got.max_vio, got.entropy, got.unseen_chance
                assert row == pytest.approx((0, 0, 0, 1, 1))
                continue
            expected = by_hand(traced, layer, None if name is None else domain)
            experts = len(got.share_E)
            assert (got.tokens, got.unseen) == (expected["tokens"], expected["unseen"])
            assert got.share_E == pytest.approx(expected["share"])
            for field in ("cv", "gini", "max_vio", "busiest_share", "dropped"):
                assert getattr(got, field) == pytest.approx(expected[field], abs=1e-12), field
            assert got.effective == pytest.approx(math.exp(expected["nats"]))
            assert got.entropy == pytest.approx(expected["nats"] / math.log(experts) if experts > 1 else 1)
            assert 0 <= got.unseen_chance <= 1


def test_weights_are_summed_where_they_were_recorded() -> None:
    index = [[[0, 1], [2, 1], [0, -1]]]
    weight = np.array([[[0.5, 0.25], [0.5, 0.25], [1.0, 9.0]]])
    [got] = balance(statistics_of(trace(index, 4, weight_LTK=weight)))
    assert got.weight_share_E == pytest.approx(np.array([1.5, 0.5, 0.5, 0]) / 2.5)
    assert balance(statistics_of(trace(index, 4)))[0].weight_share_E is None


def test_weights_that_are_no_numbers_are_refused() -> None:
    broken = trace([[[0], [1]]], 2, weight_LTK=np.array([[[1.0], [np.nan]]]))
    with pytest.raises(InputError, match=r"layers\.0\.experts: the combine weights hold NaN"):
        balance(statistics_of(broken))
    with pytest.raises(InputError, match=r"layers\.0\.experts: the combine weights hold NaN"):
        difference(broken, broken)
    sent_nowhere = trace([[[0], [-1]]], 2, weight_LTK=np.array([[[1.0], [np.nan]]]))
    assert balance(statistics_of(sent_nowhere))[0].weight_share_E == pytest.approx([1, 0])


def test_the_mean_over_batches_is_reported_for_all_tokens_only() -> None:
    statistics = statistics_of(trace([[[0], [1]]], 2))
    statistics = RoutingStatistics(
        statistics.domains, statistics.domain_B, statistics.tokens_B, 1, statistics.loads, (0.5,)
    )
    assert balance(statistics)[0].max_vio_batch == 0.5
    assert balance(statistics, "all")[0].max_vio_batch is None


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 2), (5, 2, 3), (4, 1, 4), (3, 2, 4)])
def test_the_chance_of_unseen_experts_bounds_the_exact_one(experts: int, top_k: int, tokens: int) -> None:
    """All outcomes of fair routing, one by one: the bound holds, and is exact where sets cannot overlap."""
    choices = list(combinations(range(experts), top_k))
    outcomes = Counter(len(set().union(*chosen)) for chosen in product(choices, repeat=tokens))
    total = sum(outcomes.values())
    for seen in outcomes:
        exact = sum(count for number, count in outcomes.items() if number <= seen) / total
        index = [sorted(set(range(seen)))[:top_k]] * (tokens - 1) + [list(range(seen))[-top_k:]]
        if len(set(np.ravel(index))) != seen:
            continue
        [got] = balance(statistics_of(trace([index], experts)))
        assert len(got.unseen) == experts - seen
        assert got.unseen_chance >= exact - 1e-12
        if seen == top_k:
            assert got.unseen_chance == pytest.approx(exact)


def test_an_unseen_expert_in_a_long_run_is_no_accident() -> None:
    """(1 - k/E)^T for a given expert, E times that for any: E = 64, k = 8, 200 tokens."""
    index = [[[(8 * token + rank) % 63 for rank in range(8)] for token in range(200)]]
    [got] = balance(statistics_of(trace(index, 64)))
    assert got.unseen == (63,)
    assert got.unseen_chance == pytest.approx(64 * (1 - 8 / 64) ** 200, rel=1e-9)
