"""Conventions in which implementations of one router differ, each by an option, against loops in float64.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moectl.routers.longcat import LongCat, LongCatOptions
from moectl.routers.mod import Mod, ModOptions
from moectl.routers.moe_plus_plus import MoePlusPlus, MoePlusPlusOptions
from moectl.routers.protocol import NO_EXPERT, Context, counts
from moectl.routers.softmax_top_k import Llama4, Llama4Options
from moectl.routers.sparse_is_enough import SparseIsEnough, SparseIsEnoughOptions
from moectl.routers.switch import Switch, SwitchOptions
from moectl.routers.v_moe import VMoe, VMoeOptions

USE, TRAINING = Context(), Context(training=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def asked_in_turns(scores_TE: Tensor, room: int, attempts: int, patient: bool = True) -> list[tuple[int, float]]:
    """Expert and weight of each token, -1 and 0 where none had room. Patient tokens wait until all have asked their
    best before they ask their next; others ask all of theirs when their turn comes."""
    free = [room] * scores_TE.shape[1]
    found = [(NO_EXPERT, 0.0)] * len(scores_TE)
    turns = [(rank, t) for rank in range(attempts) for t in range(len(scores_TE))]
    for rank, t in turns if patient else sorted(turns, key=lambda turn: turn[1]):
        row = scores_TE[t].tolist()
        expert = sorted(range(len(row)), key=lambda e: -row[e])[rank]
        if found[t][0] == NO_EXPERT and free[expert]:
            free[expert] -= 1
            found[t] = expert, softmax(row)[expert]
    return found


@pytest.mark.parametrize("attempts", [1, 2, 6])
def test_no_token_is_left_behind_while_a_next_expert_has_room(attempts: int) -> None:
    scores_TE = drawn(60, 6) + torch.linspace(2, 0, 6)
    options = SwitchOptions(capacity_factor=1.0, attempts=attempts)
    found = Switch(None, 6, options).route(scores_TE, TRAINING)
    wanted = asked_in_turns(scores_TE, 10, attempts)
    assert found.index_TK[:, 0].tolist() == [expert for expert, _ in wanted]
    assert found.weight_TK[:, 0].tolist() == pytest.approx([weight for _, weight in wanted], abs=1e-12)
    assert torch.equal(found.dropped_TK, found.index_TK == NO_EXPERT)
    assert bool(found.dropped_TK.any()) == (attempts < 6)
    once = Switch(None, 6, SwitchOptions(capacity_factor=1.0)).route(scores_TE, TRAINING)
    assert found.aux_loss == once.aux_loss  # of first choices, whoever got them
    impatient = asked_in_turns(scores_TE, 10, attempts, patient=False)
    assert (impatient == wanted) == (attempts == 1)  # the order of asking is seen


@pytest.mark.parametrize(
    "options",
    [{"attempts": 0}, {"attempts": 7}, {"attempts": 2, "top_k": 2}, {"attempts": 2, "capacity_factor": 0.0}],
)
def test_attempts_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="attempts"):
        Switch(None, 6, SwitchOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("multiple", "room"), [(1, 9), (4, 12), (9, 9)])
def test_room_is_rounded_up_to_a_multiple(multiple: int, room: int) -> None:
    """34 tokens, 2 choices each, 8 experts: 8.5 each; all tokens want the same two."""
    options = VMoeOptions(capacity_factor=1.0, room_multiple=multiple)
    found = VMoe(None, 8, options).route(drawn(1, 8).expand(34, -1), USE)
    assert counts(found.index_TK, 8).sort().values[-2:].tolist() == [room, room]


@pytest.mark.parametrize("multiple", [0, -4])
def test_a_multiple_that_makes_no_sense_is_refused(multiple: int) -> None:
    with pytest.raises(ValueError, match="room_multiple"):
        VMoe(None, 8, VMoeOptions(room_multiple=multiple))


@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, False), (2, True)])
def test_sigmoids_that_are_all_one_do_not_hide_the_best_logits(top_k: int, normalize: bool) -> None:
    """Llama 4's, in float32, where sigmoid(z) is 1 from 17 on; weights in float64."""
    scores_TE = 200 * drawn(40, 6)
    found = Llama4(None, 6, Llama4Options(top_k=top_k, normalize=normalize)).route(scores_TE.float(), USE)
    assert (scores_TE.float().sigmoid() == 1).sum(1).max() > 2
    for row, index, weight in zip(scores_TE.tolist(), found.index_TK.tolist(), found.weight_TK.tolist(), strict=True):
        chosen = sorted(range(6), key=lambda e: -row[e])[:top_k]
        sigmoid = [1 / (1 + math.exp(-row[e])) for e in chosen]
        total = sum(sigmoid) if normalize else 1.0
        assert index == chosen and weight == pytest.approx([value / total for value in sigmoid], abs=1e-6)


def test_depths_are_weighed_by_the_score_or_its_sigmoid() -> None:
    scores_T1 = drawn(40, 1)
    plain = Mod(None, 2, ModOptions(share=0.25)).route(scores_T1, USE)
    squashed = Mod(None, 2, ModOptions(share=0.25, sigmoid=True)).route(scores_T1, USE)
    assert torch.equal(plain.index_TK, squashed.index_TK) and int((plain.index_TK == 0).sum()) == 10
    for t in range(40):
        through = squashed.index_TK[t, 0] == 0
        wanted = 1 / (1 + math.exp(-float(scores_T1[t, 0]))) if through else 0.0
        assert squashed.weight_TK[t, 0].item() == pytest.approx(wanted, abs=1e-12)


def test_weights_of_experts_that_are_nothing_a_copy_or_a_constant_may_stay_those_of_the_softmax() -> None:
    scores_TE = drawn(50, 8)
    found = MoePlusPlus(None, 4, MoePlusPlusOptions(normalize=False)).route(scores_TE, USE)
    for t in range(50):
        p = softmax(scores_TE[t].tolist())
        chosen = sorted(range(8), key=lambda e: -p[e])[:2]
        assert found.index_TK[t].tolist() == chosen
        assert found.weight_TK[t].tolist() == pytest.approx([0.0 if e == 7 else p[e] for e in chosen], abs=1e-12)


def test_units_that_work_alone_are_weighed_by_a_softmax_that_learns_as_without() -> None:
    scores_TE, mix_TE = drawn(10, 12).requires_grad_(), drawn(10, 12, seed=1)
    options = SparseIsEnoughOptions(block=4, hard=1.0, temperature=0.0, scale=True)
    found = SparseIsEnough(None, 12, options).route(scores_TE, TRAINING)
    soft_TE = scores_TE.view(10, 3, 4).softmax(-1)
    for t in range(10):
        for block in range(3):
            p = softmax(scores_TE[t, 4 * block : 4 * block + 4].tolist())
            wanted = [value if value == max(p) else 0.0 for value in p]
            assert found.weight_TK[t, 4 * block : 4 * block + 4].tolist() == pytest.approx(wanted, abs=1e-12)
    (ours,) = torch.autograd.grad((found.weight_TK * mix_TE).sum(), scores_TE)
    straight = (soft_TE * soft_TE.detach() * mix_TE.view(10, 3, 4)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(straight, scores_TE)[0])


def longcat_loss(scores_TE: Tensor, num_experts: int, options: LongCatOptions, once: bool = False) -> float:
    """Equations 3 to 5, with a count of choices; `once`: of tokens that choose in the group at all."""
    T, E = scores_TE.shape
    size = num_experts // options.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(options.groups)] + [list(range(num_experts, E))]
    wanted = [options.active / options.groups] * options.groups + [options.top_k - options.active]
    frequency, probability = [0.0] * len(groups), [0.0] * len(groups)
    for row in scores_TE.tolist():
        p = softmax(row)
        chosen = sorted(range(E), key=lambda e: -row[e])[: options.top_k]
        for j, group in enumerate(groups):
            hits = sum(e in group for e in chosen)
            frequency[j] += (min(hits, 1) if once else hits) / T
            probability[j] += sum(p[e] for e in group) / T
    parts = zip(frequency, probability, wanted, strict=True)
    return options.aux_loss * sum(f * p / should for f, p, should in parts if should)


@pytest.mark.parametrize(("groups", "active"), [(1, 2.0), (2, 2.5), (4, 1.0)])
def test_longcat_spreads_its_choices_over_devices_and_what_computes_nothing(groups: int, active: float) -> None:
    options = LongCatOptions(top_k=4, zero_experts=4, active=active, groups=groups, aux_loss=0.5)
    scores_TE = drawn(40, 12) + torch.linspace(1, 0, 12)
    found = LongCat(None, 8, options).route(scores_TE.requires_grad_(), TRAINING)
    assert found.aux_loss.item() == pytest.approx(longcat_loss(scores_TE, 8, options), abs=1e-12)
    assert found.aux_loss.item() != pytest.approx(longcat_loss(scores_TE, 8, options, once=True), abs=1e-3)
    assert torch.autograd.gradcheck(
        lambda scores: LongCat(None, 8, options).route(scores, TRAINING).aux_loss, scores_TE
    )


def test_longcats_loss_is_its_coefficient_where_all_is_as_wanted_and_needs_no_zero_experts() -> None:
    """Each of 4 tokens chooses 2 of 8 experts that compute, in turn, and 1 of 4 others."""
    scores_TE = torch.zeros(4, 12, dtype=torch.float64)
    for t in range(4):
        scores_TE[t, [2 * t, 2 * t + 1, 8 + t]] = 1e-9
    options = LongCatOptions(top_k=3, zero_experts=4, active=2.0, groups=4, aux_loss=1.0)
    assert LongCat(None, 8, options).route(scores_TE, TRAINING).aux_loss.item() == pytest.approx(1.0, abs=1e-6)
    all_compute = LongCatOptions(top_k=2, zero_experts=0, active=2.0, groups=2, aux_loss=1.0)
    found = LongCat(None, 8, all_compute).route(drawn(30, 8), TRAINING)
    assert found.aux_loss.item() == pytest.approx(longcat_loss(drawn(30, 8), 8, all_compute), abs=1e-12)
    for wrong in ({"groups": 3}, {"groups": 0}, {"groups": -2}, {"aux_loss": 0.1}):
        with pytest.raises(ValueError, match="groups is to divide"):
            LongCat(None, 8, LongCatOptions(top_k=2, **wrong))
