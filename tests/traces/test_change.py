"""Comparisons of traces against loops, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import random_trace, trace, traces

from moectl.errors import InputError
from moectl.traces.change import difference, fluctuation, saturation
from moectl.traces.trace import RoutingTrace


def another(one: RoutingTrace, seed: int, share: float = 0.5) -> RoutingTrace:
    """The same tokens, of which a share is routed anew, dropped choices and weights included."""
    generator = np.random.default_rng(seed)
    layers = []
    for routed in one.layers:
        anew = generator.random(len(one)) < share
        order = np.argsort(generator.random((len(one), routed.point.num_experts)), axis=1)[:, : routed.point.top_k]
        order[generator.random(order.shape) < 0.2] = -1
        index = np.where(anew[:, None], order, routed.index_TK).astype(np.int16)
        weight = generator.integers(1, 9, index.shape).astype(np.float16)
        layers.append(replace(routed, index_TK=index, weight_TK=weight))
    return replace(one, layers=tuple(layers))


def chosen(routed_trace: RoutingTrace, layer: int, token: int) -> set[int]:
    """The experts of a token."""
    return {int(expert) for expert in routed_trace.layers[layer].index_TK[token]} - {-1}


def weights(routed_trace: RoutingTrace, layer: int, token: int) -> dict[int, float]:
    """A token's weights by expert, made to sum to 1."""
    routed = routed_trace.layers[layer]
    found = {
        int(expert): float(weight)
        for expert, weight in zip(routed.index_TK[token], routed.weight_TK[token], strict=True)
        if expert >= 0
    }
    return {expert: weight / sum(found.values()) for expert, weight in found.items()}


@given(traces(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_saturation_is_what_counting_gives(earlier: RoutingTrace, seed: int) -> None:
    later = another(earlier, seed)
    tokens = range(len(earlier))
    for layer, got in enumerate(saturation(earlier, later)):
        top_k, experts = got.point.top_k, got.point.num_experts
        kept = [len(chosen(earlier, layer, at) & chosen(later, layer, at)) / top_k for at in tokens]
        assert got.value == pytest.approx(np.mean(kept))
        first = [earlier.layers[layer].index_TK[at, 0] == later.layers[layer].index_TK[at, 0] for at in tokens]
        assert got.first == pytest.approx(np.mean(first))
        assert got.chance == top_k / experts
        every = [len(chosen(earlier, layer, a) & chosen(later, layer, b)) / top_k for a in tokens for b in tokens]
        assert got.chance_loads == pytest.approx(np.mean(every))


@given(traces(), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_fluctuation_is_the_last_time_a_choice_differs(first: RoutingTrace, number: int) -> None:
    every = [first]
    while len(every) < number:
        every.append(another(every[-1], len(every), 0.3))
    for layer, got in enumerate(fluctuation(every)):
        late = []
        for at in range(len(first)):
            choices = [int(traced.layers[layer].index_TK[at, 0]) for traced in every]
            late.append(max((c for c, choice in enumerate(choices) if choice != choices[-1]), default=-1))
        expected = [np.mean([last >= c for last in late]) for c in range(number - 1)]
        assert got.share_C == pytest.approx(expected)


@given(traces(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_difference_is_what_loops_give(one: RoutingTrace, seed: int) -> None:
    other = another(one, seed)
    got = difference(one, other)
    anywhere = set()
    for layer, found in enumerate(got.layers):
        pairs = [(chosen(one, layer, at), chosen(other, layer, at)) for at in range(len(one))]
        changed = [mine != theirs for mine, theirs in pairs]
        anywhere |= {at for at, different in enumerate(changed) if different}
        lost = [len(mine - theirs) / len(mine) for mine, theirs in pairs if mine]
        assert found.ids == pytest.approx(np.mean(lost) if lost else 0)
        assert found.tokens == pytest.approx(np.mean(changed))
        moved = []
        for at, (mine, theirs) in enumerate(pairs):
            if mine and theirs:
                a, b = weights(one, layer, at), weights(other, layer, at)
                moved.append(sum(abs(a.get(e, 0) - b.get(e, 0)) for e in mine | theirs) / 2)
        assert found.weights == (pytest.approx(np.mean(moved)) if moved else None)
    assert got.tokens == pytest.approx(len(anywhere) / len(one))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_chances_are_those_of_any_two_tokens(top_k: int) -> None:
    one, other = random_trace(1, [9, 8], 6, top_k), random_trace(2, [9, 8], 6, top_k)
    other = replace(one, layers=other.layers)
    every = [(a, b) for a in range(len(one)) for b in range(len(one))]
    for layer, found in enumerate(difference(one, other).layers):
        lost = [len(chosen(one, layer, a) - chosen(other, layer, b)) / top_k for a, b in every]
        first = [one.layers[layer].index_TK[a, 0] != other.layers[layer].index_TK[b, 0] for a, b in every]
        assert found.ids_chance == pytest.approx(np.mean(lost)) and found.first_chance == pytest.approx(np.mean(first))


def test_a_trace_does_not_differ_from_itself() -> None:
    one = random_trace(0, [5, 4], 6, 2, dropped=0.2)
    got = difference(one, one)
    assert got.tokens == 0
    assert all((found.ids, found.first, found.tokens, found.weights) == (0, 0, 0, 0) for found in got.layers)
    whole = random_trace(0, [5, 4], 6, 2)
    assert [found.value for found in saturation(whole, whole)] == [1, 1]


def test_the_order_of_the_experts_is_no_difference_but_one_of_first_choices() -> None:
    [got] = difference(trace([[[0, 1]]], 4), trace([[[1, 0]]], 4)).layers
    assert (got.ids, got.first, got.tokens, got.weights) == (0, 1, 0, None)


def test_the_margins_of_what_changed_are_told_from_those_of_what_stayed() -> None:
    p = np.array([[[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.5, 0.45, 0.05], [0.9, 0.05, 0.05]]])
    one = trace([[[0]] * 4], 3, score_LTE=p, score_kind="probabilities")
    [got] = difference(one, trace([[[0], [1], [1], [0]]], 3)).layers
    assert got.margin_changed == pytest.approx(median([0.05, 0.05]), abs=1e-3)
    assert got.margin_same == pytest.approx(median([0.3, 0.85]), abs=1e-3)
    [same] = difference(one, one).layers
    assert same.margin_changed is None
    routed = replace(one.layers[0], point=replace(one.layers[0].point, selects=False))
    [biased] = difference(replace(one, layers=(routed,)), one).layers
    assert (biased.margin_changed, biased.margin_same) == (None, None)


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (random_trace(0, [5, 3], 4, 2), "have 9 and 8 tokens"),
        (random_trace(0, [5, 4], 4, 2, layers=3), "have 2 and 3 MoE layers"),
        (random_trace(0, [5, 4], 5, 2), "part at MoE layer number 1: 4 experts, top 2, in decoder 0, and 5 experts"),
        (random_trace(0, [5, 4], 4, 1), "part at MoE layer number 1: 4 experts, top 2, .* and 4 experts, top 1"),
        (random_trace(0, [6, 3], 4, 2), "part at token 5 of 9: its document is 1, and 0"),
        (random_trace(1, [5, 4], 4, 2), "part at token . of 9: its id is ., and ."),
    ],
)
@pytest.mark.parametrize("function", [saturation, difference, lambda *both: fluctuation(both)])
def test_traces_of_other_tokens_or_points_are_refused_with_the_place(function, other: RoutingTrace, where: str) -> None:
    with pytest.raises(InputError, match=f"Traces 1 and 2 {where}"):
        function(random_trace(0, [5, 4], 4, 2), other)


def test_ids_are_compared_where_both_traces_have_them() -> None:
    one = trace([[[0]] * 3], 2, token_T=[5, 6, 7])
    assert difference(one, trace([[[0]] * 3], 2, token_T=[-1] * 3)).tokens == 0
    with pytest.raises(InputError, match="token 2 of 3: its id is 7, and 8"):
        difference(one, trace([[[0]] * 3], 2, token_T=[5, 6, 8]))
