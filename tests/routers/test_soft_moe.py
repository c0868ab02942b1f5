"""Soft MoE: sums, permutations, sequences that do not mix, loops in float64. Legend: T tokens, D hidden, S slots."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.routers import soft_moe
from moectl.routers.protocol import Context
from moectl.routers.soft_moe import SoftMoe, SoftMoeOptions


def made(slots: int = 2) -> tuple[SoftMoe, Tensor]:
    torch.manual_seed(0)
    router = SoftMoe(8, 4, SoftMoeOptions(slots=slots)).double()
    with torch.no_grad():
        router.scale.fill_(3.0)
    return router, torch.randn(12, 8, dtype=torch.float64)


def reference(router: SoftMoe, hidden_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    key_DS, scale = router.key_DS.detach().numpy(), router.scale.item()
    T, S = len(hidden_TD), key_DS.shape[1]
    dispatch_TS, combine_TS = np.zeros((T, S)), np.zeros((T, S))
    for t in range(T):
        for s in range(S):
            x, key = hidden_TD[t], key_DS[:, s]
            cosine = sum(x * key) / math.sqrt(sum(x * x) + 1e-6) / math.sqrt(sum(key * key) + 1e-6)
            dispatch_TS[t, s] = combine_TS[t, s] = math.exp(scale * cosine)
    for s in range(S):
        dispatch_TS[:, s] /= sum(dispatch_TS[:, s])
    for t in range(T):
        combine_TS[t] /= sum(combine_TS[t])
    return dispatch_TS, combine_TS


def test_it_is_what_loops_give() -> None:
    router, hidden_TD = made()
    found = router(hidden_TD)
    dispatch_TS, combine_TS = reference(router, hidden_TD.numpy())
    np.testing.assert_allclose(found.dispatch_TS.detach(), dispatch_TS, atol=1e-12)
    np.testing.assert_allclose(found.combine_TS.detach(), combine_TS, atol=1e-12)
    assert found.aux_loss == 0


def test_keys_without_length_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    router, hidden_TD = made()
    monkeypatch.setattr(soft_moe, "unit", lambda vectors, _: vectors)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            router(hidden_TD).combine_TS.detach(), reference(router, hidden_TD.numpy())[1], atol=1e-3
        )


def test_tokens_in_another_order_are_mixed_the_same() -> None:
    router, hidden_TD = made()
    order_T = torch.randperm(12)
    one, two = router(hidden_TD), router(hidden_TD[order_T])
    torch.testing.assert_close(one.dispatch_TS[order_T], two.dispatch_TS)
    torch.testing.assert_close(one.combine_TS[order_T], two.combine_TS)


def test_sequences_do_not_mix_and_are_each_as_if_alone() -> None:
    router, hidden_TD = made()
    sequence_T = torch.tensor([0] * 5 + [1] * 7)
    found = router(hidden_TD, Context(sequence_T=sequence_T))
    assert found.dispatch_TS.shape == (12, 16)
    torch.testing.assert_close(found.dispatch_TS.sum(0), torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(found.combine_TS.sum(1), torch.ones(12, dtype=torch.float64))
    whole_TENP = found.dispatch_TS.view(12, 4, 2, 2)
    for number, rows_T in enumerate((sequence_T == 0, sequence_T == 1)):
        alone = router(hidden_TD[rows_T])
        torch.testing.assert_close(whole_TENP[rows_T][:, :, number].flatten(1), alone.dispatch_TS)
        own = found.combine_TS.view(12, 4, 2, 2)[rows_T]
        torch.testing.assert_close(own[:, :, number].flatten(1), alone.combine_TS)
        assert (own[:, :, 1 - number] == 0).all()


def test_gradients_are_those_of_the_function() -> None:
    router, hidden_TD = made(1)
    mix_TS = torch.randn(12, 4, dtype=torch.float64)

    def total(hidden_TD: Tensor) -> Tensor:
        found = router(hidden_TD, Context(training=True, sequence_T=None))
        return ((found.dispatch_TS + 2 * found.combine_TS) * mix_TS).sum()

    assert torch.autograd.gradcheck(total, (hidden_TD.requires_grad_(),))
