"""Vocabulary specialisation and co-activation against loops, and against routers whose answer is known."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import firsts, trace, traces

from moectl.traces.coactivation import coactivation
from moectl.traces.trace import RoutingTrace
from moectl.traces.vocabulary import TOP, vocabulary


def targets(traced: RoutingTrace, target: str) -> list[int]:
    """The id that counts for each token, by loops; -1 without one."""
    tokens = traced.tokens
    if target == "input":
        return tokens.token_T.tolist()
    if target == "predicted":
        return tokens.predicted_T.tolist()
    found = []
    for at in range(len(tokens)):
        last = at + 1 == len(tokens) or tokens.document_T[at + 1] != tokens.document_T[at]
        found.append(-1 if last else int(tokens.token_T[at + 1]))
    return found


@given(traces(), st.sampled_from(["input", "next", "predicted"]), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_shares_are_what_counting_gives(traced: RoutingTrace, target: str, minimum: int) -> None:
    found = vocabulary(traced, target, minimum)
    ids = targets(traced, target)
    often = {token: number for token, number in Counter(ids).items() if token >= 0 and number >= minimum}
    assert len(found) == (len(traced.layers) if often else 0)
    for layer, got in enumerate(found):
        chosen = defaultdict(Counter)
        for token, expert in zip(ids, firsts(traced, layer), strict=True):
            if expert >= 0:
                chosen[token][expert] += 1
        best = [max(chosen[token].values(), default=0) / number for token, number in often.items()]
        assert (got.ids, got.value) == (len(often), pytest.approx(np.mean(best)))
        for expert, favourites in enumerate(got.top):
            expected = sorted(
                (-chosen[token][expert] / number, -number, token)
                for token, number in often.items()
                if chosen[token][expert]
            )
            assert [(-one.share, -one.count, one.token) for one in favourites] == expected[:TOP]


def test_routing_by_a_table_of_ids_is_told_from_chance() -> None:
    generator = np.random.default_rng(0)
    token_T = generator.integers(0, 50, 4000)
    by_table, by_chance = token_T % 8, generator.integers(0, 8, 4000)
    found = vocabulary(trace([by_table[:, None], by_chance[:, None]], 8, token_T=list(token_T)))
    assert found[0].value == 1
    assert found[0].null < 0.3
    assert found[1].value == pytest.approx(found[1].null, abs=0.02)  # about 0.2 and not 1/8, so chance must be measured


def test_rare_ids_would_look_special_and_do_not_count() -> None:
    generator = np.random.default_rng(0)
    traced = trace(generator.integers(0, 8, (1, 2000, 1)), 8, token_T=list(generator.integers(0, 1000, 2000)))
    assert vocabulary(traced, minimum=1)[0].value > 0.5
    assert vocabulary(traced) == []


def test_a_trace_without_ids_answers_nothing() -> None:
    assert vocabulary(trace([[[0]] * 20], 2, token_T=[-1] * 20)) == []
    assert vocabulary(trace([[[0]] * 20], 2, token_T=[1] * 20), "predicted") == []


@given(traces(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_pairs_are_what_counting_gives(traced: RoutingTrace, adjacent: bool) -> None:
    for layer, got in enumerate(coactivation(traced, adjacent)):
        experts = got.point.num_experts
        uses, both = Counter(), Counter()
        for row in traced.layers[layer].index_TK.tolist():
            for rank, i in enumerate(row):
                uses[i] += 1
                for other, j in enumerate(row):
                    if rank != other and (not adjacent or abs(rank - other) == 1):
                        both[i, j] += 1
        for i in range(experts):
            for j in range(experts):
                share = both[i, j] / uses[i] if uses[i] else float("nan")
                assert got.together_EE[i, j] == pytest.approx(share, nan_ok=True)
        lesser = {(i, j): both[i, j] / max(uses[i], uses[j]) for i in range(experts) for j in range(i) if both[i, j]}
        for i, j, share in got.strongest:
            assert i < j and share == pytest.approx(lesser[j, i])
        assert [share for *_, share in got.strongest] == pytest.approx(sorted(lesser.values(), reverse=True)[:10])


@pytest.mark.parametrize(("adjacent", "chance"), [(False, 7 / 63), (True, 14 / 8 / 63)])
def test_chance_is_what_random_routing_gives(adjacent: bool, chance: float) -> None:
    """11.1 % for the formula of the paper, 2.8 % for its released code: 7 of 28 pairs."""
    generator = np.random.default_rng(0)
    index = np.argsort(generator.random((1, 6000, 64)), axis=2)[..., :8]
    [got] = coactivation(trace(index, 64), adjacent)
    others = ~np.eye(64, dtype=bool)
    assert got.chance == pytest.approx(chance)
    assert got.together_EE[others].mean() == pytest.approx(chance, rel=2e-3)


def test_an_expert_that_is_never_used_has_no_partners() -> None:
    [got] = coactivation(trace([[[0, 1]] * 3], 3))
    assert np.isnan(got.together_EE[2]).all()
    assert got.strongest == ((0, 1, 1.0),)
