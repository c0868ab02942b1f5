"""ReMoE's adaptive coefficient and its loss."""

from __future__ import annotations

from unittest import mock

import torch
from torch import distributed

from moectl.routers.protocol import Context, counts
from moectl.routers.remoe import ReMoe, ReMoeOptions

TRAINING = Context(training=True)
SCORES_TE = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_loss_by_hand() -> None:
    router = ReMoe(None, 6, ReMoeOptions(top_k=2, aux_loss=0.5))
    total = 0.0
    for expert in range(6):
        busy = sum(float(row[expert]) > 0 for row in SCORES_TE)
        total += 0.5 * 6 / (2 * 40) * busy * sum(max(float(row[expert]), 0) for row in SCORES_TE) / 40
    assert abs(float(router.route(SCORES_TE, TRAINING).aux_loss) - total) < 1e-9
    assert router.route(SCORES_TE, Context()).aux_loss == 0


def test_the_coefficient_grows_while_more_experts_than_wanted_run_and_falls_when_fewer_do() -> None:
    for top_k, wanted in ((1, 1.2), (5, 1 / 1.2)):
        router = ReMoe(None, 6, ReMoeOptions(top_k=top_k, aux_loss=1.0))
        load_E = counts(router.route(SCORES_TE, TRAINING).index_TK, 6)
        router.route(SCORES_TE, TRAINING)  # once more, as under gradient checkpointing
        router.route(SCORES_TE, Context())  # in use nothing is counted
        router.after_step(load_E)
        assert abs(float(router.coefficient) - wanted) < 1e-6 and router.excess == 0
    exact = ReMoe(None, 2, ReMoeOptions(top_k=1, aux_loss=1.0))
    exact.after_step(counts(exact.route(torch.tensor([[1.0, -1.0]]), TRAINING).index_TK, 2))
    assert exact.coefficient == 1


def test_what_other_processes_ran_counts_too() -> None:
    """Here fewer experts than wanted; there many more."""
    router = ReMoe(None, 6, ReMoeOptions(top_k=5, aux_loss=1.0))
    router.route(SCORES_TE, TRAINING)
    with (
        mock.patch.object(distributed, "is_initialized", lambda: True),
        mock.patch.object(distributed, "all_reduce", lambda excess: excess.add_(1000)),
    ):
        router.after_step(torch.zeros(6))
    assert float(router.coefficient) > 1.1


def test_the_loop_settles_at_the_number_of_experts_asked_for() -> None:
    """With scores that fall as the coefficient grows."""
    router, drawn_TE = ReMoe(None, 8, ReMoeOptions(top_k=2)), torch.randn(512, 8)
    active = []
    for _ in range(200):
        found = router.route(drawn_TE - 0.5 * router.coefficient.log(), TRAINING)
        active.append(float((found.index_TK >= 0).double().sum(1).mean()))
        router.after_step(counts(found.index_TK, 8))
    assert active[0] > 7.9 and 1.8 < sum(active[150:]) / 50 < 2.2
