"""DSelect-k where its codes are binary, and its penalties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_gates import dselect_k

from moectl.routers.dselect_k import DSelectK, DSelectKOptions, smooth_step
from moectl.routers.protocol import Context


def gate(num_experts: int = 8, scale: float = 1, **options: float) -> DSelectK:
    torch.manual_seed(1)
    made = DSelectK(6, num_experts, DSelectKOptions(**options)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.code_weight *= scale
    return made


HIDDEN_TD = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_smooth_step_is_flat_at_its_ends_and_symmetric() -> None:
    at = torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0], dtype=torch.float64, requires_grad=True)
    value = smooth_step(at, 1.0)
    value.sum().backward()
    assert value.tolist() == [0, 0, 0.5, 1, 1] and at.grad is not None
    np.testing.assert_allclose(at.grad.numpy(), [0, 0, 1.5, 0, 0], atol=1e-12)
    for gamma in (0.1, 0.3, 0.7):
        assert smooth_step(torch.tensor([-gamma, gamma]), gamma).tolist() == [0, 1]
    near = torch.linspace(-0.6, 0.6, 41, dtype=torch.float64)
    torch.testing.assert_close(smooth_step(near, 1.0) + smooth_step(-near, 1.0), torch.ones_like(near))


@pytest.mark.parametrize("scale", [30, 100, 10_000])
def test_the_reference_agrees_where_some_bits_are_binary(scale: float) -> None:
    router = gate(top_k=3, scale=scale)
    found = router(HIDDEN_TD[:40])
    index_TE, weight_TE = dselect_k(router, HIDDEN_TD[:40].numpy(), Context())
    np.testing.assert_array_equal(found.index_TK.numpy(), index_TE)
    np.testing.assert_allclose(found.weight_TK.detach().numpy(), weight_TE, atol=1e-12)


def test_binary_codes_choose_at_most_k_experts_and_some_codes_no_expert() -> None:
    found = gate(top_k=3, scale=1e7)(HIDDEN_TD)
    assert ((found.index_TK >= 0).sum(1) <= 3).all()
    torch.testing.assert_close(found.weight_TK.sum(1), torch.ones(200, dtype=torch.float64))
    odd = gate(num_experts=5, top_k=1, scale=1e7)(HIDDEN_TD)
    assert ((odd.index_TK >= 0).sum(1) == 0).any()


def test_one_expert_needs_no_bits_and_gets_everything() -> None:
    found = gate(num_experts=1, top_k=1)(HIDDEN_TD, Context(training=True))
    assert (found.index_TK == 0).all() and (found.weight_TK == 1).all() and found.weight_TK.shape == (200, 1)


@pytest.mark.parametrize("num_experts", [8, 6])
def test_penalties_are_the_entropy_and_the_inverse_of_what_is_reached(num_experts: int) -> None:
    router = gate(num_experts, scale=30, top_k=2, entropy=0.25)
    loss = router(HIDDEN_TD[:20], Context(training=True)).aux_loss.item()
    total = 0.0
    for x in HIDDEN_TD[:20]:
        codes = (router.code_weight @ x + router.code_bias).reshape(2, 3)
        for bits in smooth_step(codes, 1.0).detach().numpy():
            chosen = [
                np.prod([bits[b] if e >> (2 - b) & 1 else 1 - bits[b] for b in range(3)]) for e in range(num_experts)
            ]
            total += 0.25 * -sum(r * np.log(r + 1e-6) for r in chosen)
            total += 1 / sum(chosen) if num_experts == 6 else 0
    assert abs(loss - total / 20) < 1e-9


def test_the_entropy_penalty_drives_selectors_to_one_expert_each() -> None:
    router = gate(top_k=2, entropy=1.0)
    step = torch.optim.SGD(router.parameters(), lr=0.3)
    for _ in range(100):
        step.zero_grad()
        router(HIDDEN_TD, Context(training=True)).aux_loss.backward()
        step.step()
    before, after = ((made(HIDDEN_TD).index_TK >= 0).sum(1).double().mean() for made in (gate(top_k=2), router))
    assert before == 8 and after < 2.5
