"""Shares of domains and how well the path tells the domain, against loops and worlds whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import binomtest
from small_traces import firsts, random_trace, rows, trace, traces

from moectl.traces.domains import _dealt, _wilson, separation, specialisation
from moectl.traces.statistics import statistics_of
from moectl.traces.trace import RoutingTrace


@given(traces())
@settings(max_examples=60, deadline=None)
def test_shares_are_what_counting_gives(traced: RoutingTrace) -> None:
    names = traced.tokens.domains
    for layer, got in enumerate(specialisation(statistics_of(traced), resamples=20)):
        assert got.chance == got.point.top_k / got.point.num_experts
        for domain in range(len(names)):
            own = [row for row in rows(traced, layer) if row[1] == domain]
            for expert in range(got.point.num_experts):
                share = sum(expert in row[3] for row in own) / max(len(own), 1)
                assert got.share_DE[domain, expert] == pytest.approx(share)
            if len({row[0] for row in own}) < 2:
                assert (got.low_DE[domain].max(), got.high_DE[domain].min()) == (0, 1)
        assert (got.low_DE <= got.high_DE).all()
        assert got.strongest is not None and got.strongest[0] in names


def drawn(p_DE: np.ndarray, documents: int, length: int, seed: int, spread: float = 0.0) -> RoutingTrace:
    """Top-1 of two layers, documents of every domain in turn, each with its own taste (logits of sd `spread`)."""
    generator = np.random.default_rng(seed)
    domains, experts = p_DE.shape
    index = np.zeros((2, domains * documents * length, 1), int)
    for document in range(domains * documents):
        logits = np.log(p_DE[document % domains]) + generator.normal(0, spread, experts)
        p = np.exp(logits) / np.exp(logits).sum()
        index[:, document * length : (document + 1) * length, 0] = generator.choice(experts, (2, length), p=p)
    return trace(
        index,
        experts,
        lengths=[length] * (domains * documents),
        domain_N=list(range(domains)) * documents,
        domains=tuple("abcd"[:domains]),
    )


def test_the_strongest_pair_is_the_one_that_stands_out_not_the_one_that_all_share() -> None:
    index = [[[0, 1]] * 9 + [[0, 2]] * 1 + [[0, 2]] * 10]
    got = specialisation(statistics_of(trace(index, 4, lengths=[10, 10], domain_N=[0, 1], domains=("code", "prose"))))[
        0
    ]
    assert got.strongest == ("code", 1, 0.9)
    alone = specialisation(statistics_of(trace([[[0], [0], [1]]], 4)))[0]
    assert alone.strongest == ("all", 0, pytest.approx(2 / 3))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_intervals_hold_the_truth_as_often_as_they_say(spread: float) -> None:
    """Also where documents differ, as they do: intervals over tokens would then be far too narrow."""
    documents, length = 40, 30
    truth = specialisation(statistics_of(drawn(np.full((1, 4), 0.25), 4000, length, 99, spread)), 2)[0].share_DE
    held, narrow = [], []
    for seed in range(60):
        got = specialisation(statistics_of(drawn(np.full((1, 4), 0.25), documents, length, seed, spread)), 300)[0]
        held.append((got.low_DE <= truth) & (truth <= got.high_DE))
        half = 1.96 * np.sqrt(got.share_DE * (1 - got.share_DE) / (documents * length))
        narrow.append(abs(got.share_DE - truth) <= half)
    assert 0.88 <= np.mean(held) <= 0.99
    assert spread == 0 or np.mean(narrow) < 0.75


def by_hand(traced: RoutingTrace, fold_N: dict[int, int]) -> tuple[list[float], list[float]]:
    """Probability of the right domain for every token and every document, by loops; all domains are compared."""
    tokens, domains = traced.tokens, len(traced.tokens.domains)
    paths = list(zip(*(firsts(traced, layer) for layer in range(len(traced.layers))), strict=True))
    by_token, by_document = [], {}
    for number, path in enumerate(paths):
        document = int(tokens.document_T[number])
        other = [at for at in range(len(tokens)) if fold_N[int(tokens.document_T[at])] != fold_N[document]]
        likely = []
        for domain in range(domains):
            own = [at for at in other if tokens.domain_T[at] == domain]
            value = 0.0
            for layer, expert in enumerate(path):
                if expert < 0:
                    continue
                experts = traced.layers[layer].point.num_experts
                chosen = [paths[at][layer] for at in own if paths[at][layer] >= 0]
                value += math.log((chosen.count(expert) + 1) / (len(chosen) + experts))
            likely.append((value, len(own) / len(other)))
        right = int(tokens.domain_T[number])
        by_token.append(_posterior([value + math.log(prior) for value, prior in likely], right))
        by_document.setdefault(document, np.zeros(domains))
        by_document[document] += [value for value, _ in likely]
    final = []
    for document, values in by_document.items():
        other = [int(tokens.domain_N[at]) for at in by_document if fold_N[at] != fold_N[document]]
        prior = [math.log(other.count(domain) / len(other)) for domain in range(domains)]
        final.append(_posterior(list(values + prior), int(tokens.domain_N[document])))
    return by_token, final


def _posterior(logs: list[float], right: int) -> float:
    return 1 / sum(math.exp(value - logs[right]) for value in logs)


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("folds", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_probabilities_are_those_of_bayes_by_loops(seed: int, folds: int, dropped: float) -> None:
    lengths = [5, 0, 3, 7, 1, 4, 6, 2, 5, 3]
    traced = random_trace(seed, lengths, 5, 2, domains=2, layers=3, dropped=dropped)
    tokens = traced.tokens
    domain_N = tokens.domain_N[[number for number, length in enumerate(lengths) if length]]
    assert min(np.bincount(domain_N, minlength=2)) >= 2
    got = separation(traced, seed=1, folds=folds)
    assert got is not None and (got.domains, got.documents) == (("a", "b"), 9)
    documents = sorted(set(tokens.document_T.tolist()))
    by_token, by_document = by_hand(traced, dict(zip(documents, _dealt(domain_N, 2, folds, 1), strict=True)))
    for told, p in ((got.token, by_token), (got.document, by_document)):
        assert told.probability == pytest.approx(np.mean(p))
        assert told.probability != pytest.approx(np.mean(p) + 1e-4)
        assert told.accuracy == pytest.approx(np.mean([0.5 if abs(q - 0.5) < 1e-9 else q > 0.5 for q in p]))
    share = np.bincount(tokens.domain_T) / len(tokens)
    assert got.token.chance_accuracy == pytest.approx(share.max())
    assert got.token.chance_probability == pytest.approx(sum(part**2 for part in share))


@pytest.mark.parametrize(("right", "cases"), [(13, 13), (133, 134), (0, 5), (7, 20)])
def test_the_interval_of_documents_is_wilsons(right: int, cases: int) -> None:
    """Where all are right a bootstrap would be sure."""
    expected = binomtest(right, cases).proportion_ci(0.95, "wilson")
    assert _wilson(right / cases, cases) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_folds_deal_the_documents_of_every_domain_evenly() -> None:
    domain_N = np.array([0] * 7 + [1] * 2 + [0] * 3)
    fold_N = _dealt(domain_N, 2, 5, 0)
    assert np.bincount(fold_N[domain_N == 0]).tolist() == [2, 2, 2, 2, 2]
    assert sorted(fold_N[domain_N == 1]) == [0, 1]


@given(traces())
@settings(max_examples=40, deadline=None)
def test_domains_are_compared_if_two_have_two_documents_each(traced: RoutingTrace) -> None:
    tokens = traced.tokens
    documents = {(row[0], row[1]) for row in rows(traced, 0)}
    many = [sum(own == domain for _, own in documents) for domain in range(len(tokens.domains))]
    compared = [name for name, number in zip(tokens.domains, many, strict=True) if number >= 2]
    got = separation(traced, folds=2)
    assert list(got.domains if got else ()) == (compared if len(compared) > 1 else [])


def test_domains_that_route_apart_are_told_apart() -> None:
    got = separation(drawn(np.array([[0.8, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.8]]), 30, 20, seed=0))
    assert got is not None and got.document.accuracy == 1
    # Two layers, each right with 0.8 + 0.1 and undecided only between 0.8 and 0.05: the Bayes rate is near 0.97.
    assert got.token.accuracy_interval[0] > 0.9 > 0.5 == got.token.chance_accuracy
    assert got.token.accuracy_interval[0] <= got.token.accuracy <= got.token.accuracy_interval[1]


def test_domains_that_route_alike_are_not() -> None:
    """Chance lies in the interval about as often as it says, though documents differ."""
    inside = 0
    for seed in range(30):
        got = separation(drawn(np.full((3, 4), 0.25), 12, 20, seed, spread=1.0), seed=seed)
        assert got is not None
        low, high = got.token.accuracy_interval
        inside += low <= got.token.chance_accuracy <= high
    assert inside >= 24


def test_the_domain_is_not_learned_from_the_document_that_is_asked() -> None:
    """Every document has an expert of its own: seen before, it would be told; held out, it cannot be."""
    index = [[[document] for document in range(20) for _ in range(10)]]
    got = separation(trace(index, 20, lengths=[10] * 20, domain_N=[0, 1] * 10, domains=("a", "b")))
    assert got is not None and got.token.probability == pytest.approx(0.5, abs=0.02)


def test_one_domain_or_single_documents_cannot_be_compared() -> None:
    assert separation(random_trace(0, [5, 5], 4, 2)) is None
    assert separation(trace([[[0]] * 4], 2, lengths=[2, 2], domain_N=[0, 1], domains=("a", "b"))) is None
