"""Routers that go by tasks, domains and modalities: their own gates, their losses, what moves between steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases_tasks import labels

from moectl.routers.adamv_moe import AdaMvMoe, AdaMvOptions
from moectl.routers.demix import DeMix, DeMixOptions, cached_prior, posterior
from moectl.routers.limoe import Limoe, LimoeOptions, entropy_loss
from moectl.routers.protocol import NO_EXPERT, Context
from moectl.routers.task_level import MtTag, MtTagOptions, TaskLevel, TaskLevelOptions
from moectl.routers.uni_perceiver import UniPerceiver, UniPerceiverOptions

T, D, E, TASKS = 24, 6, 8, 3


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_task_goes_where_its_embedding_says_whatever_its_tokens() -> None:
    torch.manual_seed(0)
    router = TaskLevel(D, E, TaskLevelOptions(tasks=TASKS)).double()
    one, two = (router(hidden(seed), labels(T)) for seed in (0, 1))
    assert torch.equal(one.index_TK, two.index_TK)
    for token in range(T):
        task = int(labels(T).task_T[token])
        logits_E = [float(row @ router.task_ZD[task].detach()) for row in router.weight.detach()]
        assert one.index_TK[token].tolist() == np.argsort(logits_E)[::-1][:2].tolist()
    first = router(hidden()[:10], replace(labels(10), sequence_T=None))
    assert torch.equal(first.index_TK, one.index_TK[:10])  # of its own gate it is causal


def test_a_sentence_goes_where_the_gate_of_its_mean_says() -> None:
    torch.manual_seed(0)
    router = TaskLevel(D, E, TaskLevelOptions(tasks=TASKS, level="sentence")).double()
    found = router(hidden(), labels(T))
    mean_D = hidden()[5:10].mean(0)
    probability_E = (router.weight @ mean_D).softmax(-1)
    value_K, index_K = probability_E.topk(2)
    assert (found.index_TK[5:10] == index_K).all()
    torch.testing.assert_close(found.weight_TK[7], value_K / value_K.sum())
    alone = router(hidden(), replace(labels(T), sequence_T=None))
    assert (alone.index_TK == alone.index_TK[0]).all()  # all are one sentence


def test_gates_of_a_task_do_not_learn_from_another() -> None:
    router = MtTag(D, E, MtTagOptions(tasks=TASKS)).double()
    found = router(hidden(), replace(labels(T), training=True))
    found.weight_TK[labels(T).task_T == 1].sum().backward()
    assert [bool(weight.any()) for weight in router.weight_ZED.grad] == [False, True, False]


def test_what_is_missing_or_wrong_is_said() -> None:
    for router in (TaskLevel(D, E), MtTag(D, E), DeMix(D, E), UniPerceiver(D, E), AdaMvMoe(D, E)):
        with pytest.raises(ValueError, match="none is given"):
            router(hidden(), Context())
    with pytest.raises(ValueError, match="a domain is 8, of 8"):
        DeMix(None, E).route(hidden(), Context(task_T=torch.full((T,), 8)))
    with pytest.raises(ValueError, match="level is 'word'"):
        TaskLevel(None, E, TaskLevelOptions(level="word"))
    with pytest.raises(ValueError, match="a domain is -1, of 8"):
        DeMix(None, E).route(hidden(), Context(task_T=torch.arange(T) - 1))
    with pytest.raises(ValueError, match="one expert"):
        DeMix(None, E, DeMixOptions(top_k=2))
    for wrong in ("10/01", "10/01/1", "10/01/12/00"):
        with pytest.raises(ValueError, match="rows of as many bits"):
            UniPerceiver(D, E, UniPerceiverOptions(tasks=2, attributes=wrong))


def test_tokens_with_the_same_attributes_go_the_same_way() -> None:
    """Task 0 in modality 1 and task 1 in modality 0 have the same bits."""
    torch.manual_seed(0)
    options = UniPerceiverOptions(tasks=2, attributes="100/011/011/110")
    router = UniPerceiver(D, E, options)
    pairs = Context(task_T=torch.tensor([0, 0, 1, 1]), modality_T=torch.tensor([0, 1, 0, 1]))
    found = router(torch.randn(4, D), pairs)
    assert torch.equal(found.index_TK[1], found.index_TK[2])
    torch.testing.assert_close(found.weight_TK[1], found.weight_TK[2])
    assert (found.weight_TK[[0, 1, 3], None, 0] - found.weight_TK[None, [0, 1, 3], 0]).abs().gt(1e-4).sum() == 6
    noisy = router(torch.randn(4, D), replace(pairs, training=True, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(noisy.weight_TK, found.weight_TK) and noisy.aux_loss == 0


def test_a_posterior_is_bayes_rule_on_what_came_before() -> None:
    probability_TJ = np.random.default_rng(0).uniform(0.01, 1, (5, 3))
    prior_J = np.array([0.5, 0.3, 0.2])
    found_TJ = posterior(torch.tensor(probability_TJ).log(), torch.tensor(prior_J)).numpy()
    last_TJ = posterior(torch.tensor(probability_TJ).log(), torch.tensor(prior_J), history=False).numpy()
    for t in range(5):
        joint_J = [prior_J[j] * math.prod(probability_TJ[:t, j]) for j in range(3)]
        np.testing.assert_allclose(found_TJ[t], np.array(joint_J) / sum(joint_J))
        joint_J = [prior_J[j] * (probability_TJ[t - 1, j] if t else 1) for j in range(3)]
        np.testing.assert_allclose(last_TJ[t], np.array(joint_J) / sum(joint_J))


def test_a_cached_prior_is_an_exponential_average() -> None:
    posterior_NJ = torch.rand(4, 3, dtype=torch.float64)
    share_N = [0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3]
    expected_J = sum(share * posterior_J for share, posterior_J in zip(share_N, posterior_NJ, strict=True))
    torch.testing.assert_close(cached_prior(posterior_NJ), expected_J)


def test_noisy_gates_are_balanced_as_in_v_moe() -> None:
    """Loss by loops over tasks, tokens and experts."""
    options = AdaMvOptions(top_k=2, tasks=TASKS)
    router = AdaMvMoe(None, E, options)
    scores_TE = torch.randn(T, E, dtype=torch.float64)
    context = replace(labels(T), training=True)
    found = router.route(scores_TE, context)
    spread = 1 / E
    noise_TE = torch.empty(T, E, dtype=torch.float64).normal_(std=spread, generator=torch.Generator().manual_seed(0))
    noisy_TE, total = scores_TE + noise_TE, 0.0
    for task in range(TASKS):
        tokens = [t for t in range(T) if int(context.task_T[t]) == task]
        importance = [sum(float(scores_TE[t].softmax(-1)[e]) for t in tokens) for e in range(E)]
        load = []
        for e in range(E):
            least = [sorted(noisy_TE[t].tolist())[-2] for t in tokens]
            needed = [(low - float(scores_TE[t, e])) / spread for t, low in zip(tokens, least, strict=True)]
            load.append(np.mean([0.5 * math.erfc(each / math.sqrt(2)) for each in needed]))
        total += sum(0.5 * np.var(value) / np.mean(value) ** 2 for value in (importance, load))
    assert float(found.aux_loss) == pytest.approx(0.01 * total, rel=1e-6)
    np.testing.assert_array_equal(found.index_TK, noisy_TE.topk(2).indices)
    torch.testing.assert_close(found.weight_TK, noisy_TE.softmax(-1).topk(2).values)


def test_each_task_has_as_many_experts_as_it_has_grown() -> None:
    router = AdaMvMoe(None, E, AdaMvOptions(tasks=TASKS))
    router.top_k_Z[:] = torch.tensor([1, 3, 2])
    found = router.route(torch.randn(T, E), labels(T))
    chosen_T = (found.index_TK != NO_EXPERT).sum(1)
    assert torch.equal(chosen_T, router.top_k_Z[labels(T).task_T]) and not found.dropped_TK.any()


def test_experts_grow_while_validation_stands_still_and_then_settle() -> None:
    """As the release does: patience, growth, success, growth that did not help, the last expert taken back, peace."""
    router = AdaMvMoe(None, E, AdaMvOptions(tasks=2, patience=10, most=3))
    story = [
        ((5.0, 5.0), [1, 1]),  # the first is the best so far
        ((6.0, 6.0), [1, 1]),  # patience
        ((6.0, 4.0), [2, 1]),  # task 0 has waited for longer than 10 steps; task 1 is better
        ((4.0, 3.0), [2, 1]),  # it helped
        ((4.5, 2.0), [2, 1]),
        ((4.5, 1.0), [3, 1]),
    ]
    for step, (loss_Z, expected) in zip(itertools.count(6, 6), story, strict=False):
        router.validated(loss_Z, step)
        assert router.top_k_Z.tolist() == expected, step
    router.validated((9.0, 9.0), 60)  # task 0 is at the most; task 1 has waited, and the last growth helped nobody
    assert router.top_k_Z.tolist() == [3, 1] and bool(router.settled)
    router.validated((9.0, 9.0), 600)
    assert router.top_k_Z.tolist() == [3, 1]


def test_entropies_make_tokens_certain_and_modalities_spread() -> None:
    options = LimoeOptions(soft_minimum=3.0, local_loss=0.5, global_loss=2.0)
    probability_TE = torch.randn(T, E, dtype=torch.float64).softmax(-1)
    modality_T = labels(T).modality_T
    total = 0.0
    for modality in range(2):
        own = [probability_TE[t].tolist() for t in range(T) if int(modality_T[t]) == modality]
        local = np.mean([-sum(p * math.log(p) for p in row) for row in own])
        mean = [np.mean(column) for column in zip(*own, strict=True)]
        spread = -sum(p * math.log(p) for p in mean)
        total += 0.5 * local + 2 * max(0.0, math.log(3) - spread)
    assert float(entropy_loss(probability_TE, modality_T, options)) == pytest.approx(total / 2)

    one_expert = torch.eye(E, dtype=torch.float64)[torch.zeros(T, dtype=torch.int64)]
    assert float(entropy_loss(one_expert, modality_T, options)) == pytest.approx(2 * math.log(3))  # collapsed
    three = torch.eye(E, dtype=torch.float64)[torch.arange(T) % 3]
    assert float(entropy_loss(three, modality_T, options)) == pytest.approx(0, abs=1e-9)  # the soft minimum
    uniform = torch.full((T, E), 1 / E, dtype=torch.float64)
    assert float(entropy_loss(uniform, modality_T, options)) == pytest.approx(0.5 * math.log(E))  # uncertain


def test_the_most_certain_tokens_get_the_places() -> None:
    """All want expert 0; only the surest one finds room, though it comes last."""
    scores_TE = torch.zeros(8, E)
    scores_TE[:, 0] = torch.arange(1.0, 9.0)
    found = Limoe(None, E, LimoeOptions(capacity_factor=1.0)).route(scores_TE, Context())
    assert found.dropped_TK[:, 0].tolist() == [True] * 7 + [False]
