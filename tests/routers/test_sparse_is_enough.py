"""The controller in training: soft, or straight through."""

from __future__ import annotations

import pytest
import torch

from moectl.routers.protocol import Context, Routing
from moectl.routers.sparse_is_enough import SparseIsEnough, SparseIsEnoughOptions

SCORES_TE = torch.randn(10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def train(scores_TE: torch.Tensor, seed: int = 0, **options: float) -> Routing:
    made = SparseIsEnough(None, 12, SparseIsEnoughOptions(block=4, **options))  # type: ignore[arg-type]
    return made.route(scores_TE, Context(training=True, generator=torch.Generator().manual_seed(seed)))


def test_soft_batches_weigh_all_by_the_softmax_of_their_block() -> None:
    found = train(SCORES_TE, hard=0.0)
    torch.testing.assert_close(found.weight_TK, SCORES_TE.view(10, 3, 4).softmax(-1).flatten(1))
    assert (found.index_TK == torch.arange(12)).all()


def test_hard_batches_are_one_hot_with_the_gradient_of_the_softmax() -> None:
    mix_TE = torch.randn(10, 12, dtype=torch.float64)
    hard_TE, soft_TE = SCORES_TE.clone().requires_grad_(), SCORES_TE.clone().requires_grad_()
    found = train(hard_TE, hard=1.0, temperature=0.0)
    best_TE = torch.nn.functional.one_hot(SCORES_TE.view(10, 3, 4).argmax(-1), 4).flatten(1).double()
    torch.testing.assert_close(found.weight_TK.detach(), best_TE)
    (found.weight_TK * mix_TE).sum().backward()
    (train(soft_TE, hard=0.0).weight_TK * mix_TE).sum().backward()
    torch.testing.assert_close(hard_TE.grad, soft_TE.grad)


def test_noise_moves_close_calls_alone_and_that_share_of_batches_is_hard() -> None:
    close_TE = torch.tensor([[0.0, 0.05, -5.0, -5.0]]).repeat(400, 3)
    chosen = train(close_TE, hard=1.0).weight_TK.view(400, 3, 4).argmax(-1)
    assert set(chosen.unique().tolist()) == {0, 1}
    hard = [bool(train(SCORES_TE, seed, hard=0.3).weight_TK.max() > 0.999999) for seed in range(300)]
    assert abs(sum(hard) / 300 - 0.3) < 4 * (0.21 / 300) ** 0.5


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 5"):
        SparseIsEnough(None, 12, SparseIsEnoughOptions(block=5))
