"""Routers of attention's experts: what gradient MoA has, its losses; SwitchHead's dropout and first weights."""

from __future__ import annotations

import pytest
import torch

from moectl.routers.moa import Moa, MoaOptions
from moectl.routers.protocol import Context
from moectl.routers.switchhead import SwitchHead, SwitchHeadOptions

D, E = 12, 8


def test_moa_has_the_gradient_of_the_numerator_alone() -> None:
    scores_TE = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    mix_TK = torch.randn(5, 3, dtype=torch.float64)
    found = Moa(None, E, MoaOptions(top_k=3)).route(scores_TE, Context())
    (ours,) = torch.autograd.grad((found.weight_TK * mix_TK).sum(), scores_TE)
    for t in range(5):
        p = scores_TE[t].detach().softmax(-1)
        total = p[found.index_TK[t]].sum()
        for e in range(E):  # d p_i / d z_e = p_i ([i = e] - p_e)
            expected = sum(
                mix_TK[t, k] * p[i] * (float(i == e) - p[e]) / total for k, i in enumerate(found.index_TK[t].tolist())
            )
            assert float(ours[t, e]) == pytest.approx(float(expected), abs=1e-12)


def test_moa_trains_with_both_losses() -> None:
    scores_TE = torch.randn(32, E, dtype=torch.float64)
    found = Moa(None, E, MoaOptions(top_k=2, aux_loss=0.5, z_loss=0.25)).route(scores_TE, Context(training=True))
    share_E = [(found.index_TK == e).double().sum() / 64 for e in range(E)]
    balance = E * sum(share_E[e] * scores_TE.softmax(-1)[:, e].mean() for e in range(E))
    size = sum(scores_TE[t].exp().sum().log() ** 2 for t in range(32)) / 32
    torch.testing.assert_close(found.aux_loss, 0.5 * balance + 0.25 * size)


def test_switchhead_dropout_hides_experts_and_leaves_weights() -> None:
    options = SwitchHeadOptions(top_k=2, heads=3, expert_dropout=0.5)
    router = SwitchHead(None, E, options)
    scores_TE = torch.randn(200, 3 * E)
    context = Context(training=True, generator=torch.Generator().manual_seed(0))
    found, calm = router.route(scores_TE, context), router.route(scores_TE, Context())
    torch.testing.assert_close(found.weight_TK, scores_TE.sigmoid().gather(1, found.index_TK))
    kept = (found.index_TK[:, 0] == calm.index_TK[:, 0]).double().mean()
    assert 0.4 < kept < 0.6 and found.aux_loss == 0
    assert (found.index_TK // E == torch.tensor([0, 0, 1, 1, 2, 2])).all()


def test_switchhead_rows_begin_at_one_length() -> None:
    router = SwitchHead(D, E, SwitchHeadOptions(heads=3))
    torch.testing.assert_close(router.weight.norm(dim=1), torch.ones(3 * E))
