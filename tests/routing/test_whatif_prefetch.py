"""Guesses of the next layer against loops in plain Python, on what they must and what they cannot know."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from small_traces import random_trace, rows, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routing.placement.loads import halves
from moectl.routing.whatif.prefetch import CHANCE, MARKOV, NEAREST, POPULAR, Options, run
from moectl.traces.trace import Point, Routed, RoutingTrace


def by_hand(traced: RoutingTrace, matrices: int) -> dict[str, np.ndarray]:
    """Recall at 0, 1, ... E over all layers but the first, from the words of each guess."""
    fit = [half == 0 for half in halves(traced.tokens)]
    experts, layers = traced.layers[0].point.num_experts, len(traced.layers)
    taken = [[experts for _, _, _, experts in rows(traced, layer)] for layer in range(layers)]
    document = traced.tokens.document_T.tolist()
    counted = [
        [sum(e in taken[layer][t] for t in range(len(fit)) if fit[t]) for e in range(experts)]
        for layer in range(layers)
    ]
    numbers = list(dict.fromkeys(document[t] for t in range(len(fit)) if fit[t]))
    chosen = sorted({round(at) for at in np.linspace(0, len(numbers) - 1, max(matrices, 1))})
    stored = []
    for number in (numbers[at] for at in chosen):
        own = [t for t in range(len(fit)) if fit[t] and document[t] == number]
        stored.append([[sum(e in taken[layer][t] for t in own) for e in range(experts)] for layer in range(layers)])
    places: dict[str, list[int]] = {POPULAR: [], MARKOV: [], NEAREST: []}
    matrix = np.zeros((layers, experts))
    for t in range(len(fit)):
        if fit[t]:
            continue
        if t == 0 or document[t] != document[t - 1] or fit[t - 1]:
            matrix[:] = 0
        near = [0.0] * len(stored)
        for layer in range(layers):
            if layer:
                popular = sorted(range(experts), key=lambda f, layer=layer: (-counted[layer][f], f))
                score = [0.0] * experts
                for e in taken[layer - 1][t]:
                    seen = [s for s in range(len(fit)) if fit[s] and e in taken[layer - 1][s]]
                    for f in range(experts):
                        both = sum(f in taken[layer][s] for s in seen)
                        score[f] += both / len(seen) if seen else counted[layer][f] / max(sum(fit), 1)
                best = stored[max(range(len(stored)), key=lambda m, near=near: near[m])][layer]
                orders = {
                    POPULAR: popular,
                    MARKOV: sorted(popular, key=lambda f, score=score: -score[f]),
                    NEAREST: sorted(popular, key=lambda f, best=best: -best[f]),
                }
                for name, guess in orders.items():
                    places[name] += [guess.index(f) for f in taken[layer][t]]
            for e in taken[layer][t]:
                matrix[layer, e] += 1
            norm = np.linalg.norm(matrix[layer])
            for m, each in enumerate(stored):
                there = np.linalg.norm(each[layer])
                near[m] += float(matrix[layer] @ each[layer] / norm / there) if norm and there else 0.0
            near = [round(value, 5) for value in near]
    return {
        name: np.array([sum(place < m for place in each) for m in range(experts + 1)]) / max(len(each), 1)
        for name, each in places.items()
    }


@given(traces(least_tokens=2))
@settings(max_examples=30, deadline=None)
def test_guesses_are_what_loops_give(traced: RoutingTrace) -> None:
    if len(traced.layers) < 2:
        traced = RoutingTrace(traced.tokens, traced.layers * 2)
    expected = by_hand(traced, 64)
    finding = run(traced, Options())
    assert json.loads(json.dumps([finding.rows, finding.detail]))
    got = finding.detail["recall"]
    for name in (POPULAR, MARKOV):
        assert got[name] == pytest.approx(expected[name].tolist())


def test_the_nearest_matrix_is_what_loops_give() -> None:
    """Few tokens have two matrices that are equally near, which rounding decides."""
    for seed in range(16):
        lengths = [9, 12, 8, 11, 10, 9, 12, 7, 9, 8]
        traced = random_trace(seed, lengths, 6, 2, domains=3, layers=4, dropped=0.1 * (seed % 2))
        expected = by_hand(traced, 4)
        got = run(traced, Options(matrices=4)).detail["recall"]
        assert got[NEAREST] == pytest.approx(expected[NEAREST].tolist(), abs=1e-12)


def test_an_expert_that_was_not_seen_says_what_popularity_says() -> None:
    """0 is followed by 0 in 3 of 5 tokens, but 1 is what most tokens take; 2 comes with the last document only."""
    first = [[0, -1]] * 5 + [[1, -1]] * 15 + [[0, 2]]
    second = [[0, -1]] * 3 + [[1, -1]] * 17 + [[1, -1]]
    assert run(trace([first, second], 4, lengths=[20, 1]), Options()).detail["recall"][MARKOV][1] == 1
    first[-1] = [0, -1]
    assert run(trace([first, second], 4, lengths=[20, 1]), Options()).detail["recall"][MARKOV][1] == 0


def test_a_layer_that_follows_from_the_one_before_is_guessed() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 6, (400, 1))
    finding = run(trace([first, (first * 5 + 1) % 6], 6, lengths=[100] * 4), Options(target=0.99))
    recall = finding.detail["recall"]
    assert recall[MARKOV][1] == 1
    assert recall[POPULAR][1] < 0.3
    assert recall[CHANCE][1] == pytest.approx(1 / 6)
    assert finding.detail["experts_for_target"][MARKOV] == 1


def test_a_document_of_a_kind_is_found_among_the_stored_ones() -> None:
    """Documents of two kinds, which take other experts; the first layer tells which, but not from one token."""
    generator = np.random.default_rng(1)
    kinds = [0, 0, 1, 1] * 4
    layers = [np.concatenate([generator.integers(0, 4, (50, 1)) + 2 * kind for kind in kinds])]
    layers.append(np.concatenate([generator.integers(0, 2, (50, 1)) + 4 * kind for kind in kinds]))
    recall = run(trace(layers, 6, lengths=[50] * 16), Options()).detail["recall"]
    assert recall[NEAREST][2] > 0.97 > recall[MARKOV][2] > recall[POPULAR][2]


def test_independent_layers_are_guessed_as_often_as_chance_has_it() -> None:
    generator = np.random.default_rng(2)
    index = np.argsort(generator.random((3, 4000, 16)), axis=2)[..., :4]
    finding = run(trace(index, 16, lengths=[200] * 20), Options())
    for row in finding.rows:
        assert row[2] == 4 / 16
        assert all(value == pytest.approx(row[2], abs=0.02) for value in row[3:-1])
    assert [row[0] for row in finding.rows] == ["1", "2", "mean"]


def test_layers_of_other_sizes_and_domains_are_told_apart() -> None:
    traced = random_trace(4, [30, 30, 30, 30], 8, 2, domains=2, layers=2)
    point = traced.layers[1].point
    narrow = Routed(Point(point.name, 1, 5, 1, null_experts=1), traced.layers[1].index_TK[:, :1] % 5)
    finding = run(RoutingTrace(traced.tokens, (traced.layers[0], narrow)), Options(fetched=2))
    assert finding.rows[0][:3] == ("1", 2, 0.5)
    for name in (POPULAR, MARKOV, NEAREST):
        assert finding.detail["recall"][name][4] == 1
    assert set(finding.detail["domains"]) <= {"a", "b"}


def test_what_nothing_reaches_is_said() -> None:
    nobody = trace(np.full((2, 20, 1), -1), 4, lengths=[10, 10])
    assert run(nobody, Options()).headline.endswith("No number gets 90%.")


def test_what_cannot_be_guessed_is_refused() -> None:
    with pytest.raises(InputError, match="1 layers"):
        run(random_trace(0, [9, 9], 4, 1, layers=1), Options())
    with pytest.raises(UsageError):
        Options(matrices=0)
    with pytest.raises(InputError, match="1 tokens"):
        run(random_trace(0, [1], 4, 1), Options())
