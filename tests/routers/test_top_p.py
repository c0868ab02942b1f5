"""Top-p takes the fewest experts, and its losses."""

from __future__ import annotations

import numpy as np
import torch

from moectl.routers.protocol import Context
from moectl.routers.top_p import TopP, TopPOptions

SCORES_TE = 2 * torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_takes_the_fewest_that_gather_the_threshold() -> None:
    for threshold in (0.1, 0.4, 0.9, 0.999):
        found = TopP(None, 8, TopPOptions(threshold=threshold)).route(SCORES_TE, Context())
        gathered_T = found.weight_TK.sum(1)
        last_T = found.weight_TK.gather(1, (found.index_TK >= 0).sum(1, keepdim=True) - 1)[:, 0]
        assert (gathered_T > threshold).all() and (gathered_T - last_T <= threshold + 1e-12).all()


def test_losses_by_hand() -> None:
    router = TopP(None, 8, TopPOptions(threshold=0.5, aux_loss=0.3, entropy=0.2))
    found = router.route(SCORES_TE, Context(training=True))
    p = np.exp(SCORES_TE.numpy())
    p /= p.sum(1, keepdims=True)
    balance = 8 * sum(p[:, e].mean() * (found.index_TK == e).any(1).double().mean().item() for e in range(8))
    entropy = -(p * np.log(p)).sum(1).mean()
    assert abs(float(found.aux_loss) - 0.3 * balance - 0.2 * entropy) < 1e-12


def test_the_entropy_loss_makes_for_fewer_experts() -> None:
    router, scores_TE = (
        TopP(None, 8, TopPOptions(threshold=0.9, aux_loss=0.0, entropy=1.0)),
        SCORES_TE.clone().requires_grad_(),
    )
    before = (router.route(scores_TE, Context()).index_TK >= 0).sum()
    for _ in range(20):
        slope_TE = torch.autograd.grad(router.route(scores_TE, Context(training=True)).aux_loss, scores_TE)[0]
        scores_TE = (scores_TE - 30 * slope_TE).detach().requires_grad_()
    assert (router.route(scores_TE, Context()).index_TK >= 0).sum() < 0.8 * before
