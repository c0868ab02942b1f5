"""Repetition and context independence against loops, exact chances, and routers whose answer is known."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from small_traces import firsts, random_trace, trace, traces

from moectl.traces.locality import any_fair, context_independence, repetition
from moectl.traces.trace import RoutingTrace


@given(traces())
@settings(max_examples=80, deadline=None)
def test_repeats_are_what_counting_gives(traced: RoutingTrace) -> None:
    tokens = traced.tokens
    pairs = [at for at in range(1, len(tokens)) if tokens.document_T[at] == tokens.document_T[at - 1]]
    found = repetition(traced)
    assert len(found) == (len(traced.layers) if pairs else 0)
    for layer, got in enumerate(found):
        index = traced.layers[layer].index_TK.tolist()
        names = {tokens.domains[tokens.domain_T[at]] for at in pairs}
        assert set(got.domains) == names
        nulls = {}
        for name in names:
            every = [at for at in range(len(tokens)) if tokens.domains[tokens.domain_T[at]] == name]
            loads = Counter(index[at][0] for at in every if index[at][0] >= 0)
            nulls[name] = sum((load / len(every)) ** 2 for load in loads.values())
        for name, part in [(None, got), *got.domains.items()]:
            own = [at for at in pairs if name in (None, tokens.domains[tokens.domain_T[at]])]
            assert part.pairs == len(own)
            same = sum(index[at][0] == index[at - 1][0] != -1 for at in own)
            common = sum(bool(set(index[at]) & set(index[at - 1]) - {-1}) for at in own)
            assert part.first == pytest.approx(same / len(own))
            assert part.any == pytest.approx(common / len(own))
            assert part.first_null == pytest.approx(np.mean([nulls[tokens.domains[tokens.domain_T[at]]] for at in own]))
            assert 0 <= part.any_shuffled <= 1


def test_tokens_that_do_not_follow_directly_are_no_pairs() -> None:
    traced = trace([[[0]] * 5], 2)
    traced.tokens.position_T[:] = [0, 1, 5, -1, 0]
    assert repetition(traced)[0].pairs == 1
    assert repetition(trace([[[0]] * 3], 2, lengths=[1, 1, 1])) == []
    parted = trace([[[0]] * 4], 2, lengths=[2, 2])
    parted.tokens.position_T[:] = [0, 1, 2, 3]
    assert repetition(parted)[0].pairs == 2


def test_the_chance_of_meeting_is_46_43_per_cent_for_2_of_8() -> None:
    assert round(100 * any_fair(8, 2), 2) == 46.43


@pytest.mark.parametrize("experts", [1, 2, 5, 7])
def test_the_chance_of_meeting_is_exact(experts: int) -> None:
    for top_k in range(1, experts + 1):
        choices = [set(choice) for choice in combinations(range(experts), top_k)]
        meet = np.mean([bool(one & other) for one in choices for other in choices])
        assert any_fair(experts, top_k) == pytest.approx(meet)


def test_nulls_are_what_independent_tokens_give_whatever_the_loads() -> None:
    generator = np.random.default_rng(0)
    uneven = np.log(np.arange(1, 9)) + generator.gumbel(size=(1, 20000, 8))
    [got] = repetition(trace(np.argsort(-uneven, axis=2)[..., :2], 8))
    assert got.first == pytest.approx(got.first_null, abs=0.01) and got.first_null > got.first_fair + 0.03
    assert got.any == pytest.approx(got.any_shuffled, abs=0.015) and got.any_shuffled > got.any_null + 0.05


def test_neighbours_that_share_but_their_domain_do_not_repeat() -> None:
    """Each domain has experts of its own and draws among them by a lot: all that repeats is the domain."""
    own = np.random.default_rng(0).integers(0, 4, (4, 5000)) + 4 * (np.arange(4)[:, None] % 2)
    [got] = repetition(trace(own.reshape(1, -1, 1), 8, lengths=[5000] * 4, domain_N=[0, 1] * 2, domains=("a", "b")))
    assert got.first == pytest.approx(got.first_null, abs=0.01) and got.first_null == pytest.approx(0.25, abs=0.01)
    assert got.any == pytest.approx(got.any_shuffled, abs=0.015)


def plug_in(first: list[int], label: list[object]) -> float:
    """Mutual information by its sum over pairs of values."""
    total = len(first)
    both, one, other = Counter(zip(first, label, strict=True)), Counter(first), Counter(label)
    return sum(n / total * math.log(n * total / (one[a] * other[b])) for (a, b), n in both.items())


@given(traces())
@settings(max_examples=60, deadline=None)
def test_information_is_the_sum_over_pairs(traced: RoutingTrace) -> None:
    found = context_independence(traced)
    assert len(found) == len(traced.layers)
    for layer, got in enumerate(found):
        first, label = firsts(traced, layer), traced.tokens.token_T.tolist()
        assert got.information == pytest.approx(plug_in(first, label), abs=1e-12)
        assert got.entropy == pytest.approx(plug_in(first, first), abs=1e-12)
        assert got.value <= 1 + 1e-9 and got.gain <= 1 + 1e-9
        if got.entropy - got.null > 1e-6:
            assert got.value == pytest.approx((got.information - got.null) / (got.entropy - got.null), abs=1e-9)


def worlds() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ids, and first choices by the id, by the id and the one before it, by the one before it alone, and by a lot."""
    generator = np.random.default_rng(0)
    token_T = generator.integers(0, 20, 8000)
    before_T = np.roll(token_T, 1)
    return token_T, {
        "id": token_T % 4,
        "both": (token_T * 7 + before_T * 3) // 2 % 4,
        "before": before_T % 4,
        "lot": generator.integers(0, 4, 8000),
    }


def test_what_the_id_and_the_token_before_it_tell() -> None:
    token_T, chosen = worlds()
    found = context_independence(trace(np.stack(list(chosen.values()))[..., None], 4, token_T=list(token_T)))
    got = dict(zip(chosen, found, strict=True))
    assert (got["id"].value, got["id"].gain) == (pytest.approx(1), 0)
    assert got["before"].value == pytest.approx(0, abs=0.01) and got["before"].gain > 0.99
    assert got["both"].gain > 0.99
    assert got["lot"].value == pytest.approx(0, abs=0.01) and got["lot"].gain == pytest.approx(0, abs=0.03)
    assert plug_in(list(chosen["lot"]), list(zip(token_T, np.roll(token_T, 1), strict=True))) > 0.05  # as counted


def test_a_token_before_that_the_id_decides_adds_nothing() -> None:
    """Ids in a fixed circle: to shuffle what comes before over all tokens would make pairs that are not there."""
    index = np.random.default_rng(0).integers(0, 4, (1, 4000, 1))
    [got] = context_independence(trace(index, 4, token_T=[at % 20 for at in range(4000)]))
    assert got.gain == pytest.approx(0, abs=1e-9)


def test_a_trace_without_ids_answers_nothing() -> None:
    assert context_independence(trace([[[0]] * 20], 2, token_T=[-1] * 20)) == []
    assert context_independence(random_trace(0, [0], 2, 1)) == []
