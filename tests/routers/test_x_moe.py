"""Cosine gates: what they do not see, their temperatures, their losses."""

from __future__ import annotations

import pytest
import torch

from moectl.routers.protocol import Context
from moectl.routers.x_moe import TutelCosine, TutelCosineOptions, XMoe, XMoeOptions

HIDDEN_TD = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def x_moe(**options: object) -> XMoe:
    torch.manual_seed(0)
    return XMoe(12, 8, XMoeOptions(**options)).double()  # type: ignore[arg-type]


def test_neither_the_length_of_a_token_nor_of_an_expert_matters() -> None:
    router = x_moe()
    before = router(HIDDEN_TD)
    with torch.no_grad():
        router.weight *= torch.rand(8, 1) + 0.5
    after = router(HIDDEN_TD * (torch.rand(50, 1) + 0.5))
    assert torch.equal(before.index_TK, after.index_TK)
    torch.testing.assert_close(before.weight_TK, after.weight_TK)
    unscaled = x_moe(normalize=False)
    assert (unscaled(HIDDEN_TD).weight_TK - unscaled(2 * HIDDEN_TD).weight_TK).abs().max() > 0.01


def test_half_the_experts_is_the_size_and_temperatures_are_learnt() -> None:
    router = x_moe()
    assert router.projection.shape == (4, 12) and router.weight.shape == (8, 4)
    router(HIDDEN_TD).weight_TK.sum().backward()
    assert router.temperature.grad is not None and router.temperature.grad.abs() > 0


def test_the_balancing_loss_does_not_see_the_learnt_temperature() -> None:
    router = x_moe(aux_loss=1.0)
    loss = router(HIDDEN_TD, Context(training=True)).aux_loss
    cosine_TE = router.score(HIDDEN_TD, Context())
    probability_TE = (cosine_TE / 0.3).softmax(-1)
    share_E = torch.stack([(cosine_TE.argmax(1) == expert).double().mean() for expert in range(8)])
    torch.testing.assert_close(loss, 8 * (share_E * probability_TE.mean(0)).sum())
    with torch.no_grad():
        router.temperature.fill_(2.0)
    torch.testing.assert_close(router(HIDDEN_TD, Context(training=True)).aux_loss, loss)


def test_tutel_keeps_its_temperature_over_a_hundredth_and_counts_first_choices() -> None:
    torch.manual_seed(0)
    router = TutelCosine(12, 8, TutelCosineOptions(top_k=2, aux_loss=1.0, capacity_factor=0.0)).double()
    first_TE = router.score(HIDDEN_TD, Context())  # cosines over 0.5
    with torch.no_grad():
        router.log_scale.fill_(50.0)
    logits_TE = router.score(HIDDEN_TD, Context())
    torch.testing.assert_close(logits_TE, first_TE * 0.5 / 0.01)
    found = router(HIDDEN_TD, Context(training=True))
    share_E = torch.stack([(found.index_TK[:, 0] == expert).double().mean() for expert in range(8)])
    torch.testing.assert_close(found.aux_loss, 8 * (share_E * logits_TE.softmax(-1).mean(0)).sum())


def test_another_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="neither softmax"):
        x_moe(gate="relu")
