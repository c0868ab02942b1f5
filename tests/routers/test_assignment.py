"""The best assignment is scipy's, and what moving costs is what scipy loses. Legend: T tokens, E experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moectl.routers.assignment import balanced, losses_of_moving


def best(scores_TE: np.ndarray, room_E: np.ndarray) -> float:
    wide = np.repeat(scores_TE, room_E, axis=1)
    rows, columns = linear_sum_assignment(wide, maximize=True)
    return float(wide[rows, columns].sum())


shapes = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_it_is_as_good_as_a_matching_by_scipy(shape: tuple[int, int, int, int, bool]) -> None:
    T, E, spare, seed, tied = shape
    scores_TE = np.random.default_rng(seed).normal(size=(T, E))
    scores_TE = np.round(scores_TE) if tied else scores_TE
    room = -(-T // E) + spare
    expert_T = balanced(torch.from_numpy(scores_TE), room).numpy()
    assert np.bincount(expert_T, minlength=E).max() <= room
    assert scores_TE[np.arange(T), expert_T].sum() == pytest.approx(best(scores_TE, np.full(E, room)), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_moving_costs_what_the_others_lose(shape: tuple[int, int, int, int, bool]) -> None:
    T, E, spare, seed, _ = shape
    scores_TE = np.random.default_rng(seed).normal(size=(T, E))
    room = -(-T // E) + spare
    expert_T = balanced(torch.from_numpy(scores_TE), room)
    loss_EE = losses_of_moving(torch.from_numpy(scores_TE), expert_T, room).numpy()
    at = int(expert_T[0])
    value_E = np.array([best(scores_TE[1:], np.full(E, room) - (np.arange(E) == e)) for e in range(E)])
    np.testing.assert_allclose(value_E[at] - value_E, loss_EE[:, at], atol=1e-9)


def test_an_exchange_of_two_tokens_is_seen_to_be_worse() -> None:
    scores_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expert_T = balanced(scores_TE, 8)
    worse_T = expert_T.clone()
    other = int((expert_T != expert_T[0]).nonzero()[0])
    worse_T[0], worse_T[other] = expert_T[other], expert_T[0]
    value, worse = (float(scores_TE.gather(1, at_T[:, None]).sum()) for at_T in (expert_T, worse_T))
    assert value > worse + 1e-3
    assert value == pytest.approx(best(scores_TE.numpy(), np.full(8, 8)), abs=1e-9)


def test_more_tokens_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        balanced(torch.zeros(5, 2), 2)
