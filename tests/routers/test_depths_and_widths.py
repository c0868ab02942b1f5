"""Mixture-of-Depths and Nested Experts: sequences, what decides, shares. Legend: T tokens, D hidden, E experts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases_assigned import shares_by_slsqp

from moectl.routers.mod import Mod, ModOptions
from moectl.routers.mone import Mone, MoneOptions, shares
from moectl.routers.protocol import NO_EXPERT, Context, counts
from moectl.routers.sequences import lengths, ranks

SEQUENCE_T = torch.tensor([0] * 10 + [1] * 6 + [2] * 24)


def test_ranks_are_of_a_tokens_own_sequence() -> None:
    value_T = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0)).float()
    expected = []
    for t in range(40):
        own = [u for u in range(40) if SEQUENCE_T[u] == SEQUENCE_T[t]]
        expected.append(sum((value_T[u], -u) > (value_T[t], -t) for u in own))
    assert ranks(value_T, SEQUENCE_T).tolist() == expected
    assert lengths(SEQUENCE_T, value_T).tolist() == [10] * 10 + [6] * 6 + [24] * 24


def made(decide: str) -> tuple[Mod, torch.Tensor]:
    torch.manual_seed(0)
    hidden_TD = torch.randn(40, 8)
    hidden_TD[:, 0] = 1  # as good as a bias: a gate without one says yes to half of all centred tokens
    return Mod(8, 1, ModOptions(decide=decide, aux_loss=1.0)), hidden_TD


def test_an_eighth_of_each_sequence_passes_through() -> None:
    router, hidden_TD = made("top")
    through_T = router(hidden_TD, Context(sequence_T=SEQUENCE_T)).index_TK[:, 0] != NO_EXPERT
    assert [int(through_T[number == SEQUENCE_T].sum()) for number in range(3)] == [2, 1, 3]


@pytest.mark.parametrize("decide", ["threshold", "predictor"])
def test_what_decides_in_use_is_causal_and_learns_the_choice(decide: str) -> None:
    router, hidden_TD = made(decide)
    other_TD = torch.cat([hidden_TD[:20], torch.randn(20, 8)])
    one, two = router(hidden_TD).index_TK, router(other_TD).index_TK
    assert torch.equal(one[:20], two[:20]) and (one == 0).any() and (one == NO_EXPERT).any()
    context = Context(training=True, sequence_T=SEQUENCE_T)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        found = router(hidden_TD, context)
        optimizer.zero_grad()
        found.aux_loss.backward()
        optimizer.step()
    agree = (router(hidden_TD).index_TK == router(hidden_TD, context).index_TK).double().mean()
    assert agree > 0.9


def test_the_predictors_loss_does_not_touch_the_gate_or_what_is_below() -> None:
    router, hidden_TD = made("predictor")
    hidden_TD.requires_grad_()
    router(hidden_TD, Context(training=True)).aux_loss.backward()
    assert router.weight.grad is None and hidden_TD.grad is None
    assert router.predictor[0].weight.grad.abs().max() > 0


def test_the_threshold_loss_is_the_cross_entropy_of_the_choice() -> None:
    router, hidden_TD = made("threshold")
    found = router(hidden_TD, Context(training=True))
    score_T = (hidden_TD @ router.weight[0]).tolist()
    chosen = (found.index_TK[:, 0] == 0).tolist()
    loss = [math.log1p(math.exp(-r if yes else r)) for r, yes in zip(score_T, chosen, strict=True)]
    assert found.aux_loss.item() == pytest.approx(sum(loss) / 40, rel=1e-5)
    assert router(hidden_TD).aux_loss == 0


@pytest.mark.parametrize("effective_capacity", [0.2, 0.6, 0.8])
@pytest.mark.parametrize("num_experts", [4, 6])
def test_shares_are_those_of_the_papers_optimiser(num_experts: int, effective_capacity: float) -> None:
    found_E = np.array(shares(num_experts, effective_capacity))
    np.testing.assert_allclose(found_E, shares_by_slsqp(num_experts, effective_capacity), atol=2e-4)
    assert found_E.sum() == pytest.approx(1)


def test_every_sequence_has_the_same_shares_and_wider_experts_choose_first() -> None:
    router = Mone(None, 4, MoneOptions(effective_capacity=0.6))
    scores_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    index_T1 = router.route(scores_TE, Context(sequence_T=SEQUENCE_T)).index_TK
    for number in range(3):
        own_T = number == SEQUENCE_T
        wanted = [math.floor(share * int(own_T.sum())) for share in router.share]
        wanted[0] += int(own_T.sum()) - sum(wanted)
        assert counts(index_T1[own_T], 4).tolist() == wanted
        probability_T = scores_TE.softmax(1)[own_T, 3]
        assert probability_T[index_T1[own_T, 0] == 3].min() >= probability_T[index_T1[own_T, 0] != 3].max()


def test_a_new_gate_multiplies_with_one_and_learns_its_factor() -> None:
    router = Mone(8, 4)
    weight_T1 = router(torch.randn(12, 8), Context(training=True)).weight_TK
    assert (weight_T1 == 1).all()
    weight_T1.sum().backward()
    assert router.alpha.grad > 0 and router.bias.shape == (4,)


def test_capacities_that_no_shares_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lies between 0\.125 and 1"):
        Mone(None, 4, MoneOptions(effective_capacity=0.1))
    with pytest.raises(ValueError, match="decide is one of"):
        Mod(8, 1, ModOptions(decide="coin"))
