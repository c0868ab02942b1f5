"""Expert choice with a cap on a token's experts: the program's solution is that of other solvers.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from moectl.routers.capped import assigned
from moectl.routers.expert_choice import ExpertChoice, ExpertChoiceOptions
from moectl.routers.protocol import NO_EXPERT, Context, counts


def shares(tokens: int, experts: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=draw, dtype=torch.float64)).softmax(1)


def totals(tokens: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that add up each token's, and each expert's, entries of a flattened [T, E]."""
    return np.kron(np.eye(tokens), np.ones(experts)), np.kron(np.ones(tokens), np.eye(experts))


@pytest.mark.parametrize(("room", "most"), [(3, 1), (3, 2), (6, 2)])
def test_the_solution_is_that_of_a_general_optimiser(room: int, most: int) -> None:
    share_TE, strength = shares(9, 3), 0.3
    by_token, by_expert = totals(9, 3)
    found = minimize(
        lambda a: -(share_TE.numpy().ravel() @ a) + strength * (a * np.log(a)).sum(),
        np.full(27, room / 9),
        jac=lambda a: -share_TE.numpy().ravel() + strength * (np.log(a) + 1),
        method="SLSQP",
        bounds=[(1e-12, 1)] * 27,
        constraints=[
            {"type": "eq", "fun": lambda a: by_expert @ a - room},
            {"type": "ineq", "fun": lambda a: most - by_token @ a},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    solution_TE = assigned(share_TE, room, most, strength, 10_000).clamp(max=0).exp()
    np.testing.assert_allclose(solution_TE.numpy().ravel(), found.x, atol=2e-5)


def test_what_is_chosen_is_worth_what_the_linear_program_is() -> None:
    share_TE, room, most = shares(64, 8), 16, 3
    by_token, by_expert = totals(64, 8)
    best = linprog(
        -share_TE.numpy().ravel(), by_token, np.full(64, most), by_expert, np.full(8, room), bounds=(0, 1)
    ).fun
    found = ExpertChoice(None, 8, ExpertChoiceOptions(most=most)).route(share_TE.log(), Context())
    assert found.weight_TK.sum().item() == pytest.approx(-best, rel=2e-3)
    assert counts(found.index_TK, 8).tolist() == [room] * 8


@pytest.mark.parametrize(("tokens", "experts", "most"), [(512, 16, 3), (512, 16, 2), (101, 8, 2), (40, 64, 3)])
def test_hardly_a_token_has_more_than_the_cap(tokens: int, experts: int, most: int) -> None:
    """One more, where a last place is shared; before the first round, without prices of tokens, more have more."""
    share_TE = shares(tokens, experts)
    found = ExpertChoice(None, experts, ExpertChoiceOptions(most=most)).route(share_TE.log(), Context())
    number_T, load_E = (found.index_TK != NO_EXPERT).sum(1), counts(found.index_TK, experts)
    assert (number_T > most).double().mean() <= 0.01 and number_T.max() <= most + 1 and load_E.unique().numel() == 1
    unpriced_TE = assigned(share_TE, int(load_E[0]), most, rounds=0)
    taken_CE = unpriced_TE.argsort(dim=0, descending=True)[: int(load_E[0])]
    assert (taken_CE.flatten().bincount(minlength=tokens) > most).double().mean() > 0.02


def test_a_cap_that_binds_nobody_changes_nothing() -> None:
    scores_TE = shares(50, 8).log()
    free = ExpertChoice(None, 8).route(scores_TE, Context())
    for most in (8, 20):
        found = ExpertChoice(None, 8, ExpertChoiceOptions(most=most)).route(scores_TE, Context())
        assert torch.equal(found.index_TK, free.index_TK) and torch.equal(found.weight_TK, free.weight_TK)
    few = ExpertChoice(None, 8, ExpertChoiceOptions(most=1)).route(scores_TE[:3], Context())
    assert (few.index_TK == NO_EXPERT).all()  # three tokens with one expert each cannot serve eight experts alike


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="most is -1"):
        ExpertChoice(None, 8, ExpertChoiceOptions(most=-1))
