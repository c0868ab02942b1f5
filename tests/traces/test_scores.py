"""What the routers' scores say, against softmax by hand and the loss that transformers computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small_traces import rows, trace, traces
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moectl.errors import InputError
from moectl.traces.scores import pooled_aux, score_metrics
from moectl.traces.statistics import MARGIN_EDGES, statistics_of
from moectl.traces.trace import RoutingTrace


def probabilities(traced: RoutingTrace, layer: int, token: int) -> list[float]:
    """Of one token, by hand."""
    point, score = traced.layers[layer].point, [float(s) for s in traced.layers[layer].score_TE[token]]
    if point.score_kind == "logits":
        score = [math.exp(s) if point.scoring == "softmax" else 1 / (1 + math.exp(-s)) for s in score]
    return [s / sum(score) for s in score]


@given(traces())
@settings(max_examples=60, deadline=None)
def test_every_number_is_what_loops_give(traced: RoutingTrace) -> None:
    for layer, got in enumerate(score_metrics(statistics_of(traced))):
        point, tokens = traced.layers[layer].point, len(traced)
        experts = point.num_experts
        p = [probabilities(traced, layer, token) for token in range(tokens)]
        chosen = [row[3] for row in rows(traced, layer)]
        aux = experts * sum(
            sum(e in row for row in chosen) / tokens * sum(row[e] for row in p) / tokens for e in range(experts)
        )
        assert got.aux == pytest.approx(aux)
        entropy = sum(-q * math.log(q) for row in p for q in row if q) / tokens
        assert got.entropy == pytest.approx(entropy, abs=1e-12)
        assert got.entropy_share == pytest.approx(entropy / math.log(experts) if experts > 1 else 0)
        if point.score_kind == "logits":
            score = traced.layers[layer].score_TE.astype(float)
            z = sum(math.log(sum(math.exp(s) for s in row)) ** 2 for row in score) / tokens
            assert got.z == pytest.approx(z)
        else:
            assert got.z is None
        if point.top_k == experts:
            assert got.margin_median is None
            continue
        lead = sorted(sorted(row)[-point.top_k] - sorted(row)[-point.top_k - 1] for row in p)
        low = np.searchsorted(
            MARGIN_EDGES, lead[(tokens - 1) // 2] - 1e-9
        )  # a margin on an edge may fall to either side
        high = np.searchsorted(MARGIN_EDGES, lead[tokens // 2] + 1e-9)
        assert MARGIN_EDGES[max(low - 1, 0)] <= got.margin_median <= MARGIN_EDGES[min(high, len(MARGIN_EDGES) - 1)]


def collapsed(pairs: list[tuple[int, int]]) -> RoutingTrace:
    """Layers, of 8 experts, that send all of 50 tokens to a pair."""
    score = np.full((len(pairs), 50, 8), -60.0)
    for layer, pair in enumerate(pairs):
        score[layer][:, pair] = 0
    return trace([[pair] * 50 for pair in pairs], 8, score_LTE=score)


def test_the_pooled_loss_is_blind_and_that_of_a_layer_is_not() -> None:
    """Four layers, each collapsed onto a pair of its own: 2.0 pooled, as in perfect balance, and 8.0 each."""
    statistics = statistics_of(collapsed([(0, 1), (2, 3), (4, 5), (6, 7)]))
    assert pooled_aux(statistics) == pytest.approx(2.0)
    assert [layer.aux for layer in score_metrics(statistics)] == pytest.approx([8.0] * 4)
    assert pooled_aux(statistics_of(collapsed([(0, 1)]))) == pytest.approx(8.0)


def test_perfect_balance_gives_k() -> None:
    index = [[[(token + rank) % 8 for rank in range(2)] for token in range(8)]]
    score = np.full((1, 8, 8), -60.0)
    for token in range(8):
        score[0, token, index[0][token]] = 0
    [got] = score_metrics(statistics_of(trace(index, 8, score_LTE=score)))
    assert got.aux == pytest.approx(2.0)


def test_the_losses_are_those_of_transformers() -> None:
    score = np.random.default_rng(1).normal(0, 2, (3, 200, 8)).astype(np.float16)
    index = np.argsort(-score, axis=2)[..., :2]
    statistics = statistics_of(trace(index, 8, score_LTE=score))
    logits = tuple(torch.from_numpy(layer).double() for layer in score)
    assert pooled_aux(statistics) == pytest.approx(float(load_balancing_loss_func(logits, 8, 2)), rel=1e-6)
    for layer, got in zip(logits, score_metrics(statistics), strict=True):
        expected = float(load_balancing_loss_func((layer,), 8, 2))
        assert got.aux == pytest.approx(expected, rel=1e-6)
        assert got.aux * 1.0001 != pytest.approx(expected, rel=1e-6)


def test_points_without_scores_are_left_out() -> None:
    statistics = statistics_of(trace([[[0]]], 2))
    assert score_metrics(statistics) == []
    assert pooled_aux(statistics) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_point_and_token(bad: float) -> None:
    score = np.zeros((1, 3, 2))
    score[0, 2, 1] = bad
    with pytest.raises(InputError, match=r"layers\.0\.experts: .* NaN or infinity, first at token 2"):
        statistics_of(trace([[[0], [1], [0]]], 2, score_LTE=score))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_largest_scores_of_float16_do_not_overflow(scoring: str) -> None:
    score = np.array([[[65504.0, -65504.0], [-65504.0, 65504.0]]])
    with np.errstate(all="raise", under="ignore"):
        [got] = score_metrics(statistics_of(trace([[[0], [1]]], 2, score_LTE=score, scoring=scoring)))
    assert (got.entropy, got.aux) == (0, pytest.approx(1.0))
