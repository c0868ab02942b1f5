"""Balancing loss, z-loss and selection biases against plain float64 sums and their derivatives written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import softmax

from moectl.routers.bias import step_towards_mean
from moectl.routers.losses import balance, z_loss
from moectl.routers.protocol import wide

TOKENS, EXPERTS, TOP_K = 37, 6, 2


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, E] in float64 and how often each expert is among the first K."""
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    chosen = logits.topk(TOP_K, -1).indices
    return logits, torch.bincount(chosen.flatten(), minlength=EXPERTS)


def balance_of(logits: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    return balance(wide(logits).softmax(-1), load)


def test_balancing_is_the_sum_in_the_paper_and_its_gradient() -> None:
    logits, load = routed()
    rows = [softmax(row) for row in logits.tolist()]
    share = [count / (TOKENS * TOP_K) for count in load.tolist()]
    mean = [math.fsum(row[e] for row in rows) / TOKENS for e in range(EXPERTS)]
    expected = EXPERTS * math.fsum(f * p for f, p in zip(share, mean, strict=True))
    # d/dx_te of E sum_i f_i mean_t p_ti = E/T * p_te * (f_e - sum_i f_i p_ti)
    slope = [
        [
            EXPERTS / TOKENS * p * (f - math.fsum(a * b for a, b in zip(share, row, strict=True)))
            for p, f in zip(row, share, strict=True)
        ]
        for row in rows
    ]
    logits.requires_grad_()
    loss = balance_of(logits, load)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert logits.grad.abs().max() > 1e-3, "the router is moved by it"


def test_a_softmax_over_the_chosen_alone_would_move_nothing() -> None:
    """The trap: its mean over all K is the constant 1/K, so its gradient is zero, unlike ours."""
    logits, load = routed()
    logits.requires_grad_()
    trap = logits.topk(TOP_K, -1).values.softmax(-1).mean(-1).sum()
    assert torch.autograd.grad(trap, logits)[0].abs().max() < 1e-12
    assert torch.autograd.grad(balance_of(logits, load), logits)[0].abs().max() > 1e-3


def test_one_is_balance_and_all_on_one_expert_is_the_number_of_experts() -> None:
    assert balance_of(torch.zeros(TOKENS, EXPERTS), torch.ones(EXPERTS)).item() == pytest.approx(1)
    lopsided = torch.zeros(TOKENS, EXPERTS)
    lopsided[:, 3] = 100
    load = torch.zeros(EXPERTS)
    load[3] = TOKENS
    assert balance_of(lopsided, load).item() == pytest.approx(EXPERTS)


def test_pieces_with_the_load_of_the_whole_are_the_whole() -> None:
    logits, load = routed()
    logits = logits[:36]
    whole = balance_of(logits, load)
    pieces = [balance_of(piece, load) for piece in logits.chunk(4)]
    assert torch.stack(pieces).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    own = [
        balance_of(piece, torch.bincount(piece.topk(2, -1).indices.flatten(), minlength=EXPERTS))
        for piece in logits.chunk(4)
    ]
    assert abs(torch.stack(own).mean().item() - whole.item()) > 1e-3, "each with its own load is another loss"


def test_z_is_the_mean_squared_log_of_the_sum_and_its_gradient() -> None:
    logits, _ = routed(1)
    logs = [math.log(math.fsum(map(math.exp, row))) for row in logits.tolist()]
    slope = [[2 * log * p / TOKENS for p in softmax(row)] for log, row in zip(logs, logits.tolist(), strict=True)]
    logits.requires_grad_()
    loss = z_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(math.fsum(log**2 for log in logs) / TOKENS, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_low_precision_logits_are_widened_first() -> None:
    logits, load = routed()
    for loss in (lambda x: balance_of(x, load), z_loss):
        narrow = loss(logits.bfloat16())
        assert narrow.dtype == torch.float32
        assert narrow.item() == pytest.approx(loss(logits.bfloat16().double()).item(), rel=1e-6)


def test_the_selection_bias_moves_towards_balance_by_its_rate() -> None:
    load = torch.tensor([4, 0, 9, 3])  # mean 4
    bias = torch.zeros(4)
    step_towards_mean(bias, load, 0.001)
    assert bias.tolist() == pytest.approx([0, 0.001, -0.001, 0.001])


def test_selection_biases_balance_a_fixed_router() -> None:
    """Applied again and again they make the loads of a lopsided router even: what they are for."""
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(3)) + torch.linspace(-1, 1, 8)
    scores, bias = logits.sigmoid(), torch.zeros(8)

    def load() -> torch.Tensor:
        return torch.bincount((scores + bias).topk(2, -1).indices.flatten(), minlength=8)

    before = load()
    for _ in range(300):
        step_towards_mean(bias, load(), 0.003)
    assert before.max() > 1.8 * before.double().mean()
    assert load().max() < 1.1 * load().double().mean()
