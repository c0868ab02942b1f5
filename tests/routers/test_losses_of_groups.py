"""Losses of routers with groups of experts, by loops, and what they pull at. Legend: T tokens, E experts."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, pvariance, variance

import pytest
import torch
from by_hand import best, softmax

from moectl.routers.e3 import E3, E3Options
from moectl.routers.moec import Moec, MoecOptions, variance_within
from moectl.routers.protocol import Context, Router, Routing
from moectl.routers.prototyping import Prototyping, PrototypingOptions
from moectl.routers.sam import Sam, SamOptions, alignment_loss

T, E = 24, 8
SCORES = torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = SCORES.tolist()


def training(router: Router, scores_TE: torch.Tensor = SCORES) -> Routing:
    return router.route(scores_TE, Context(training=True, generator=torch.Generator().manual_seed(1)))


def balance(probability: list[list[float]], chosen: list[list[int]]) -> float:
    """The switch loss, in loops."""
    experts = range(len(probability[0]))
    share = [sum(row.count(e) for row in chosen) / sum(map(len, chosen)) for e in experts]
    return len(share) * sum(share[e] * fmean(row[e] for row in probability) for e in experts)


def test_prototypes_are_balanced_one_by_one() -> None:
    found = training(Prototyping(None, E, PrototypingOptions(aux_loss=0.5)))
    halves = [[softmax(row[first : first + 4]) for row in ROWS] for first in (0, 4)]
    expected = 0.5 * sum(balance(half, [best(row, 1) for row in half]) for half in halves)
    assert found.aux_loss.item() == pytest.approx(expected, rel=1e-12)
    assert training(Prototyping(None, E)).aux_loss == 0


def test_moec_leaves_out_half_of_each_cluster() -> None:
    found = training(Moec(None, E, MoecOptions(groups=2)))
    used = set(found.index_TK[:, 0].tolist())
    assert len([e for e in used if e < 4]) <= 2 >= len([e for e in used if e >= 4])
    drawn = Context(training=True, generator=torch.Generator().manual_seed(3))
    router = Moec(None, E, MoecOptions(groups=2))
    seen = {int(e) for _ in range(30) for e in router.route(SCORES, drawn).index_TK.unique()}
    assert seen == set(range(E))


@pytest.mark.parametrize("apart", [False, True])
def test_moecs_loss_is_balance_and_variance_within_clusters(apart: bool) -> None:
    found = training(Moec(None, E, MoecOptions(groups=2, dropout=0.0, aux_loss=0.1, variance=3.0, apart=apart)))
    probability = [softmax(row) for row in ROWS]
    mean = [fmean(row[e] for row in probability) for e in range(E)]
    spread = fmean([variance(mean[:4]), variance(mean[4:])])
    if apart:
        falling = sorted(mean, reverse=True)
        spread /= math.exp(fmean(falling[:4]) - fmean(falling[4:]))
    expected = 0.1 * (balance(probability, [best(row, 1) for row in ROWS]) + 3 * E * spread)
    assert found.aux_loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_variance_draws_a_cluster_together_and_nothing_across() -> None:
    mean_GE = torch.tensor([[0.3, 0.1], [0.35, 0.25]], dtype=torch.float64, requires_grad=True)
    gradient_GE = torch.autograd.grad(variance_within(mean_GE), mean_GE)[0]
    assert gradient_GE[0, 0] > 0 > gradient_GE[0, 1] and gradient_GE[1, 0] > 0 > gradient_GE[1, 1]
    assert variance_within(torch.tensor([[0.2, 0.2], [0.3, 0.3]])) == 0
    assert variance_within(torch.tensor([[0.2], [0.8]])) == 0


def test_sams_losses_are_those_of_loops() -> None:
    found = training(Sam(None, E, SamOptions(groups=2, aux_loss=0.1, alignment=0.5)))
    probability = [softmax(row) for row in ROWS]
    aligned, chosen = 0.0, []
    for share in probability:
        first = 4 * best([sum(share[:4]), sum(share[4:])], 1)[0]
        chosen.append([first + e for e in best(share[first : first + 4], 2)])
        others = [share[e] for e in range(E) if e // 4 != first // 4]
        aligned += sum(max(0.0, value - share[chosen[-1][1]]) for value in others) / T
    expected = 0.1 * 2 * balance(probability, chosen) + 0.5 * aligned
    assert found.aux_loss.item() == pytest.approx(expected, rel=1e-12)


def test_alignment_lowers_experts_elsewhere_and_leaves_the_chosen_alone() -> None:
    probability_TE = torch.tensor([[0.3, 0.15, 0.25, 0.1, 0.1, 0.1]], requires_grad=True)
    loss = alignment_loss(probability_TE, torch.tensor([[0, 1]]), 3)
    gradient_TE = torch.autograd.grad(loss, probability_TE)[0]
    assert loss.item() == pytest.approx(0.1) and gradient_TE.tolist() == [[0, 0, 1, 0, 0, 0]]


def test_e3s_losses_are_v_moes_for_each_member() -> None:
    found = training(E3(None, E, E3Options(aux_loss=0.5)))
    noise_TE = torch.empty(T, 2, 4, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1)) / 4
    total = 0.0
    for m in range(2):
        clean = [row[4 * m : 4 * m + 4] for row in ROWS]
        noisy = (torch.tensor(clean, dtype=torch.float64) + noise_TE[:, m]).tolist()
        importance = [sum(softmax(row)[e] for row in clean) for e in range(4)]
        load = [
            fmean(NormalDist().cdf((row[e] - max(other)) * 4) for row, other in zip(clean, noisy, strict=True))
            for e in range(4)
        ]
        total += sum(pvariance(values) / fmean(values) ** 2 for values in (importance, load))
        assert found.index_TK[:, m].tolist() == [best(row, 1)[0] + 4 * m for row in noisy]
    assert found.aux_loss.item() == pytest.approx(0.5 * total / 2 / 2, rel=1e-6)


@pytest.mark.parametrize(
    "kind", [lambda: Prototyping(None, 8, PrototypingOptions(top_k=3)), lambda: Moec(None, 8, MoecOptions(groups=3))]
)
def test_groups_of_unequal_size_are_refused(kind: type[Router]) -> None:
    with pytest.raises(ValueError, match="divide"):
        kind()
    with pytest.raises(ValueError, match="cannot choose 5 each"):
        E3(None, 8, E3Options(top_k=5))
    with pytest.raises(ValueError, match="fewer than top_k"):
        Sam(None, 8, SamOptions(groups=8))
