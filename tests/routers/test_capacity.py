"""Queues, groups and the rooms of routers that give experts of different kinds different ones, against loops.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.routers.capacity import capacity, kept, places
from moectl.routers.deepseek_v2 import DeepSeekV2, DeepSeekV2Options
from moectl.routers.expert_groups import check, limited
from moectl.routers.moe_plus_plus import MoePlusPlus, MoePlusPlusOptions
from moectl.routers.protocol import NO_EXPERT, Context, counts

CHOICES = st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(CHOICES, st.lists(st.integers(0, 2), min_size=12, max_size=12), st.booleans(), st.booleans())
def test_places_are_those_of_a_queue(
    choices: list[tuple[int, ...]], drawn: list[int], by_priority: bool, by_sequence: bool
) -> None:
    T, K = len(choices), 3
    priority = drawn[:T] if by_priority else [0] * T
    sequence = sorted(drawn[:T]) if by_sequence else [0] * T
    taken: dict[tuple[int, int], int] = {}
    expected = [[NO_EXPERT] * K for _ in range(T)]
    for rank in range(K):
        for token in sorted(range(T), key=lambda t: (-priority[t], t)):
            if (expert := choices[token][rank]) != NO_EXPERT:
                line = (sequence[token], expert)
                expected[token][rank] = taken.get(line, 0)
                taken[line] = taken.get(line, 0) + 1
    found = places(
        torch.tensor(choices),
        4,
        torch.tensor(priority, dtype=torch.float) if by_priority else None,
        torch.tensor(sequence) if by_sequence else None,
    )
    assert found.tolist() == expected


def test_conventions_differ_by_a_rounding() -> None:
    """27 tokens, 8 experts, 2 choices, factor 1.1: 7.425 places."""
    rooms = [capacity(27, 8, 2, 1.1, convention) for convention in ("switch", "tutel", "megatron")]
    assert rooms == [8, 8, 8]
    rooms = [capacity(25, 8, 2, 1.0, convention) for convention in ("switch", "tutel", "megatron")]
    assert rooms == [7, 8, 7]


def test_first_choices_come_before_second_ones() -> None:
    index_TK = torch.tensor([[1, 0], [0, 1], [0, 2]])
    assert kept(index_TK, 3, 2).tolist() == [[True, False], [True, True], [True, True]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(2, 1), (4, 2), (4, 4), (8, 3)]), st.sampled_from([1, 2]))
def test_groups_with_the_best_sums_stay_open(seed: int, shape: tuple[int, int], best: int) -> None:
    groups, top_groups = shape
    choice_TE = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed))
    found_TE = limited(choice_TE, groups, top_groups, best)
    for row, found in zip(choice_TE.tolist(), found_TE.tolist(), strict=True):
        size = 16 // groups
        worth = [sum(sorted(row[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        opened = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
        assert found == [value if e // size in opened else float("-inf") for e, value in enumerate(row)]


@pytest.mark.parametrize(
    ("options", "said"),
    [((8, 3, 1, 2), "does not divide"), ((8, 2, 3, 2), "top_groups is 3"), ((8, 4, 1, 3), "fewer than top_k = 3")],
)
def test_groups_that_make_no_sense_are_refused(options: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(*options)


def test_a_device_drops_its_least_likely_assignments() -> None:
    """DeepSeek-V2 in training; in use it drops nothing."""
    router = DeepSeekV2(None, 8, DeepSeekV2Options(top_k=2, groups=2, top_groups=2))
    scores_TE = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0] * 4 + [0.0] * 4)
    free, routing = router.route(scores_TE, Context()), router.route(scores_TE, Context(training=True))
    probability_TE = scores_TE.softmax(-1)
    for device in range(2):
        wanted = [(t, k) for t in range(20) for k in range(2) if free.index_TK[t, k] // 4 == device]
        wanted.sort(key=lambda place: -float(probability_TE[place[0], free.index_TK[place]]))
        assert all(not routing.dropped_TK[place] for place in wanted[:20])
        assert all(routing.dropped_TK[place] for place in wanted[20:])
    assert routing.dropped_TK.any() and not free.dropped_TK.any()


@pytest.mark.parametrize("spared", [0.0, 0.4, 1.0])
def test_nothing_is_dropped_of_spared_sequences_and_others_make_room(spared: float) -> None:
    """All tokens want the same device, which takes half of them; 400 sequences of two."""
    scores_TE = torch.randn(800, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([9.0, 9.0, 0.0, 0.0])
    options = DeepSeekV2Options(top_k=1, groups=2, top_groups=2, spared=spared)
    context = Context(
        True, sequence_T=torch.arange(400).repeat_interleave(2), generator=torch.Generator().manual_seed(1)
    )
    dropped_N = DeepSeekV2(None, 4, options).route(scores_TE, context).dropped_TK.view(400, 2).sum(1)
    drawn_N = torch.rand(400, generator=torch.Generator().manual_seed(1)) < spared
    assert not dropped_N[drawn_N].any() and dropped_N.sum() == min(400, 800 - 2 * int(drawn_N.sum()))
    assert bool((dropped_N == 1).any()) == (spared < 1)  # others are dropped token by token


def test_experts_that_compute_nothing_have_more_room() -> None:
    """MoE++ in training, where all tokens want the same two: 1.1 * 24 / (0.75 * 4 + 4) is 3.77."""
    router = MoePlusPlus(None, 4, MoePlusPlusOptions())
    scores_TE = torch.zeros(12, 8)
    scores_TE[:, 1], scores_TE[:, 6] = 3.0, 2.0
    routing = router.route(scores_TE, Context(training=True))
    assert counts(routing.index_TK, 8).tolist() == [0, 3, 0, 0, 0, 0, 4, 0]
