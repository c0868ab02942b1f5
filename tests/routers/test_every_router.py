"""Every router is held to its case: shapes, sums, room, causality, balance, an independent reference, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from routers_cases import CASES, Case

from moectl.routers.protocol import NO_EXPERT, Context, Routing, counts
from moectl.routers.registry import find, names


def over(keep: Callable[[Case], bool] = lambda _case: True) -> pytest.MarkDecorator:
    cases = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", cases, ids=[case.label for case in cases])


def training(context: Context) -> Context:
    return replace(context, training=True, progress=0.5)


def test_every_router_has_a_case() -> None:
    assert {case.name for case in CASES} == set(names())


@over()
@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize("learning", [False, True], ids=["use", "training"])
def test_shapes_numbers_and_sums(case: Case, tokens: int, learning: bool) -> None:
    context = case.context(tokens)
    found: Routing = case.run(case.router(), case.given(tokens), training(context) if learning else context)
    index_TK, weight_TK = found.index_TK, found.weight_TK
    assert index_TK.shape == weight_TK.shape == found.dropped_TK.shape and len(index_TK) == tokens
    assert index_TK.dtype == torch.int64 and found.dropped_TK.dtype == torch.bool and weight_TK.is_floating_point()
    assert ((index_TK >= NO_EXPERT) & (index_TK < reach(case))).all()
    assert (weight_TK[index_TK == NO_EXPERT] == 0).all() and weight_TK.isfinite().all()
    assert (index_TK[found.dropped_TK] == NO_EXPERT).all()
    assert found.aux_loss.shape == () and found.aux_loss.isfinite()
    if not learning:
        assert found.aux_loss == 0
        whole_T = ~found.dropped_TK.any(1)
        if case.sums is not None:
            assert case.sums(weight_TK.sum(1)[whole_T]).all()
    if case.distinct:
        for row_K in index_TK.tolist():
            chosen = [expert for expert in row_K if expert != NO_EXPERT]
            assert len(chosen) == len(set(chosen))


@over()
def test_a_float64_reference_chooses_the_same(case: Case) -> None:
    router, given = case.router(torch.float64), case.given(48, seed=3, dtype=torch.float64)
    found = case.run(router, given, case.context(48))
    index_TK, weight_TK = case.reference(router, given.numpy(), case.context(48))
    np.testing.assert_array_equal(found.index_TK.numpy(), index_TK)
    np.testing.assert_allclose(found.weight_TK.detach().numpy(), weight_TK, atol=1e-9, rtol=1e-9)


@over(lambda case: find(case.name).causal)
def test_later_tokens_change_nothing_of_earlier_ones(case: Case) -> None:
    router, given = case.router(), case.given(32)
    other = given.clone()
    other[20:] = case.given(12, seed=9)
    context = case.context(32)
    one, two = case.run(router, given, context), case.run(router, other, case.context(32))
    assert torch.equal(one.index_TK[:20], two.index_TK[:20])
    torch.testing.assert_close(one.weight_TK[:20], two.weight_TK[:20])


@over(lambda case: not find(case.name).causal)
def test_what_is_said_to_look_ahead_does(case: Case) -> None:
    """Some later tokens change where some earlier one goes: else it would be called causal."""
    router, given = case.router(), case.given(64)
    before = case.run(router, given, case.context(64))
    for seed in range(1, 20):
        other = given.clone()
        other[8:] = 3 * case.given(56, seed=seed)
        after = case.run(router, other, case.context(64))
        if not torch.equal(before.index_TK[:8], after.index_TK[:8]):
            return
    pytest.fail("no later token ever mattered")


@over(lambda case: case.balance is not None)
def test_independent_scores_are_spread_evenly(case: Case) -> None:
    found = case.run(case.router(), case.given(4096), case.context(4096))
    load_E = counts(found.index_TK, reach(case)).double()
    assert load_E.max() / load_E.mean() <= case.balance


@over(lambda case: case.room is not None)
@pytest.mark.parametrize("tokens", [7, 64, 301])
def test_no_expert_takes_more_than_its_room(case: Case, tokens: int) -> None:
    """Even where all tokens want the same one."""
    given = case.given(1).expand(tokens, -1).contiguous()
    found = case.run(case.router(), given, case.context(tokens))
    assert case.room is not None and counts(found.index_TK, reach(case)).max() <= case.room(tokens)


@over(lambda case: find(case.name).trainable and case.numerical)
def test_gradients_are_those_of_the_function(case: Case) -> None:
    router = case.router(torch.float64)
    given = case.given(6, seed=5, dtype=torch.float64).requires_grad_()
    mix_TK = torch.randn(case.run(router, given, training(case.context(6))).weight_TK.shape, dtype=torch.float64)

    def total(given: torch.Tensor) -> torch.Tensor:
        found = case.run(router, given, training(case.context(6)))
        return (found.weight_TK * mix_TK).sum() + found.aux_loss

    assert torch.autograd.gradcheck(total, (given,), atol=1e-6)
    assert given.grad is None and torch.autograd.grad(total(given), given)[0].abs().max() > 0


@over(lambda case: not find(case.name).trainable)
def test_what_is_said_not_to_be_trained_has_no_gradient(case: Case) -> None:
    given = case.given(6).requires_grad_()
    assert not case.run(case.router(), given, training(case.context(6))).weight_TK.requires_grad


@over()
def test_the_same_draws_give_the_same(case: Case) -> None:
    router, given = case.router(), case.given(33)
    one, two = (case.run(router, given, training(case.context(33))) for _ in range(2))
    assert torch.equal(one.index_TK, two.index_TK) and torch.equal(one.weight_TK, two.weight_TK)


@over()
def test_half_precision_and_equal_or_large_scores_give_weights_in_single_precision(case: Case) -> None:
    for router, given in (
        (case.router(torch.bfloat16), case.given(12, dtype=torch.bfloat16)),
        (case.router(), case.given(12, dtype=torch.bfloat16)),
        (case.router(), torch.zeros_like(case.given(12))),
        (case.router(), 1e4 * case.given(12)),
    ):
        for context in (case.context(12), training(case.context(12))):
            weight_TK = case.run(router, given, context).weight_TK
            assert weight_TK.dtype == torch.float32 and weight_TK.isfinite().all()


@over(lambda case: find(case.name).trainable)
def test_gradients_of_equal_and_of_large_scores_are_finite(case: Case) -> None:
    for given in (torch.zeros_like(case.given(12)), 1e4 * case.given(12)):
        given.requires_grad_()
        found = case.run(case.router(), given, training(case.context(12)))
        (slope,) = torch.autograd.grad(found.weight_TK.sum() + found.aux_loss, given)
        assert slope.isfinite().all()


def reach(case: Case) -> int:
    """How many experts there are to go to: more than `num_experts` where some compute nothing or are products."""
    return getattr(case.router(), "reach", case.num_experts)
