"""The recorder by itself: sums of scores against float64, rows in any order and packed, parts put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moectl.errors import InputError
from moectl.routing.capture import Seen
from moectl.routing.recorder import PADDING, Recorder, Rows, merged
from moectl.routing.score_sums import ScoreSums
from moectl.routing.tap import Tap
from moectl.traces.statistics import Scored, scored, statistics_of
from moectl.traces.store import Recording
from moectl.traces.trace import NO_EXPERT, Point

DOMAIN_N, LENGTH_N = np.array([0, 1, 0, 1], np.int32), np.array([5, 3, 1, 7])


def tap(experts: int = 6, top_k: int = 2, ordered: bool = True, **facts: Any) -> Tap:
    point = Point("layers.0.mlp.experts", 0, experts, top_k, **{"score_kind": "logits", **facts})
    return Tap(point, nn.Identity(), nn.Identity(), lambda index, weights: (index, weights), lambda x: x, ordered)


def routed(rows: int, experts: int = 6, top_k: int = 2, seed: int = 0) -> Seen:
    """A plain softmax router on random scores."""
    score_TE = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    top = score_TE.softmax(-1).topk(top_k, dim=-1)
    return Seen(top.indices, top.values, score_TE)


def rows_of(*pieces: tuple[int, int, int]) -> Rows:
    """Rows of (document, first place, how many)."""
    document = np.concatenate([np.full(count, number) for number, _, count in pieces]).astype(np.int32)
    position = np.concatenate([np.arange(start, start + count) for _, start, count in pieces]).astype(np.int32)
    return Rows(document, position, (100 * document + position).astype(np.int64))


def recorder(*taps: Tap, length_N: np.ndarray = LENGTH_N, **options: Any) -> Recorder:
    return Recorder(taps or (tap(),), ["a", "b"], DOMAIN_N, length_N, kept_N=length_N > 0, **options)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sums_of_scores_are_those_of_float64(data: st.DataObject) -> None:
    """For logits under either function and for probabilities, any k, with ties, in parts, the choice known or not."""
    experts = data.draw(st.integers(1, 12))
    top_k, tokens = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 40))
    kind, scoring = data.draw(
        st.sampled_from([("logits", "softmax"), ("logits", "sigmoid"), ("probabilities", "softmax")])
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    score_TE = 4 * torch.randn(tokens, experts, generator=generator)
    if data.draw(st.booleans()):
        score_TE = score_TE.round()
    if kind == "probabilities":
        score_TE = score_TE.softmax(-1)
    point = Point("x", 0, experts, top_k, score_kind=kind, scoring=scoring)
    sums = ScoreSums(point, torch.device("cpu"))
    for part in score_TE.split(17):
        sums.add(part, part.topk(top_k, dim=-1).indices if data.draw(st.booleans()) else None)
    check_sums(sums.total(), scored(point, score_TE.numpy()))


def check_sums(found: Scored, expected: Scored) -> None:
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.probability_E, expected.probability_E, rtol=1e-4, atol=1e-5)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-4, abs=1e-4)
    assert found.z == pytest.approx(expected.z, rel=1e-4, nan_ok=True)
    assert found.margin_M.sum() == expected.margin_M.sum()
    # A margin within a rounding of the edge of a bin may fall on either side of it.
    assert np.abs(np.cumsum(found.margin_M) - np.cumsum(expected.margin_M)).max() <= 1


def test_a_wrong_sum_is_found() -> None:
    """With the other scoring function, or one token counted twice."""
    score_TE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    point = Point("x", 0, 6, 2, score_kind="logits")
    for wrong, part in ((Point("x", 0, 6, 2, score_kind="logits", scoring="sigmoid"), 40), (point, 41)):
        sums = ScoreSums(wrong, torch.device("cpu"))
        sums.add(torch.cat([score_TE, score_TE[:1]])[:part])
        with pytest.raises(AssertionError):
            check_sums(sums.total(), scored(point, score_TE.numpy()))


def complete(recording: Recording) -> None:
    """Every token is there once, in the order of the documents, and counted as in the trace."""
    tokens = recording.trace.tokens
    assert np.array_equal(tokens.token_T, 100 * tokens.document_T + tokens.position_T)
    assert np.array_equal(np.bincount(tokens.document_T), LENGTH_N)
    found, expected = recording.statistics, statistics_of(recording.trace)
    assert np.array_equal(found.tokens_B, expected.tokens_B)
    assert found.documents == len(LENGTH_N)
    for one, other in zip(found.loads, expected.loads, strict=True):
        assert np.array_equal(one.count_BE, other.count_BE) and np.array_equal(one.first_BE, other.first_BE)
        assert one.dropped == other.dropped


def test_packed_rows_in_any_order() -> None:
    """Several documents in one row, a document over two passes, padding in between."""
    made = recorder(scores=True)
    made.add([routed(9)], rows_of((3, 4, 3), (PADDING, 0, 2), (1, 0, 3), (2, 0, 1)))
    made.add([routed(10, seed=1)], rows_of((0, 0, 5), (3, 0, 4), (PADDING, 0, 1)))
    recording = made.recording({})
    complete(recording)
    assert recording.statistics.loads[0].scored is not None
    assert recording.statistics.loads[0].scored.tokens == LENGTH_N.sum()
    first = routed(9)
    at = np.flatnonzero(recording.trace.tokens.document_T == 1)
    assert np.array_equal(recording.trace.layers[0].index_TK[at], first.index_TK[5:8])
    score_TE = recording.trace.layers[0].score_TE
    assert score_TE is not None and first.score_TE is not None
    np.testing.assert_allclose(score_TE[at], first.score_TE[5:8], atol=2e-3)


def test_dropped_and_unordered_choices() -> None:
    """What went nowhere is counted as that, and the heaviest expert comes first."""
    made = recorder(tap(ordered=False), scores=False)
    index = torch.tensor([[2, 4], [5, 0], [NO_EXPERT, 1]]).repeat(6, 1)[:16]
    weight = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]).repeat(6, 1)[:16]
    made.add([Seen(index, weight)], rows_of((0, 0, 5), (1, 0, 3), (2, 0, 1), (3, 0, 7)))
    recording = made.recording({})
    complete(recording)
    assert recording.trace.layers[0].index_TK[:3].tolist() == [[4, 2], [5, 0], [1, NO_EXPERT]]
    assert recording.statistics.loads[0].dropped == int((index < 0).sum())
    weight_BE = recording.statistics.loads[0].weight_BE
    assert weight_BE is not None and weight_BE.sum() == pytest.approx(float(weight.sum()))


def test_parts_of_several_processes_are_one() -> None:
    """One of them had no documents at all."""
    parts = []
    for mine, passes in (
        ([0, 3], [rows_of((3, 0, 7), (0, 0, 5))]),
        ([1, 2], [rows_of((1, 0, 3), (2, 0, 1))]),
        ([], []),
    ):
        length_N = np.where(np.isin(np.arange(4), mine), LENGTH_N, 0)
        made = recorder(length_N=length_N, scores=True)
        for rows in passes:
            made.add([routed(len(rows.document_R))], rows)
        parts.append(made.recording({}))
    both = merged(parts)
    complete(both)
    assert both.sampled == 1
    assert both.statistics.loads[0].scored is not None
    assert both.statistics.loads[0].scored.tokens == LENGTH_N.sum()


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="given 5 rows, and the model 4 tokens"):
        recorder().add([routed(5)], rows_of((3, 0, 4)))


def test_scores_that_are_no_numbers_are_refused() -> None:
    seen = routed(5)
    assert seen.score_TE is not None
    seen.score_TE[3, 2] = float("-inf")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: the router's scores hold NaN or infinity"):
        recorder().add([seen], rows_of((0, 0, 5)))
