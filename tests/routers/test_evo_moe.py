"""EvoMoE's annealing."""

from __future__ import annotations

import torch

from moectl.routers.evo_moe import EvoMoe, EvoMoeOptions
from moectl.routers.protocol import Context, Routing

SCORES_TE = torch.randn(500, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(progress: float, **options: float) -> Routing:
    context = Context(training=True, progress=progress, generator=torch.Generator().manual_seed(1))
    return EvoMoe(None, 16, EvoMoeOptions(**options)).route(SCORES_TE, context)  # type: ignore[arg-type]


def test_the_gate_begins_dense_and_becomes_sparser() -> None:
    active = [float((at(progress).index_TK >= 0).double().sum(1).mean()) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert active[0] > 15.9 and active == sorted(active, reverse=True) and active[-1] < 10
    assert EvoMoe(None, 16).temperature(0) == 2 and abs(EvoMoe(None, 16).temperature(1) - 0.3) < 1e-12


def test_experts_at_or_below_the_threshold_are_left_out_and_nothing_is_rescaled() -> None:
    all_of_it, some = at(0.5, threshold=0.0), at(0.5, threshold=0.05)
    torch.testing.assert_close(all_of_it.weight_TK.sum(1), torch.ones(500, dtype=torch.float64))
    kept_TE = all_of_it.weight_TK > 0.05
    torch.testing.assert_close(some.weight_TK, all_of_it.weight_TK * kept_TE)
    assert torch.equal(some.index_TK >= 0, kept_TE)


def test_a_cold_gumbel_softmax_draws_from_the_softmax() -> None:
    scores_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    context = Context(training=True, progress=1.0, generator=torch.Generator().manual_seed(0))
    drawn = EvoMoe(None, 4, EvoMoeOptions(final_temperature=1e-3)).route(scores_TE, context).index_TK[:, 0]
    share_E = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share_E, scores_TE[0].softmax(0), atol=0.015, rtol=0)


def test_plain_weights_are_the_softmax_of_the_chosen() -> None:
    found = at(0.5, gumbel=False)
    wanted_TE = SCORES_TE.softmax(-1).gather(1, found.index_TK.clamp(min=0)) * (found.index_TK >= 0)
    torch.testing.assert_close(found.weight_TK, wanted_TE)


def test_balancing_loss_by_hand() -> None:
    found = at(0.5, aux_loss=1.0, threshold=0.05)
    total = 0.0
    for expert in range(16):
        where_TE = found.index_TK == expert
        total += 16 * float(found.weight_TK[where_TE].sum() / 500 * where_TE.any(1).double().mean())
    assert abs(float(found.aux_loss) - total) < 1e-12
