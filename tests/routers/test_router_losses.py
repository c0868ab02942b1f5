"""Losses that routers add in training, against loops over tokens and experts; and that they push towards balance.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, pvariance
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

from moectl.routers.deepseek_v2 import DeepSeekV2, DeepSeekV2Options
from moectl.routers.losses import load_balancing, sequence_load_balancing, z_loss
from moectl.routers.noisy_top_k import NoisyTopK, NoisyTopKOptions
from moectl.routers.protocol import Context
from moectl.routers.registry import find

T, E = 30, 8


def scores(seed: int = 0, skew: float = 0.0) -> Tensor:
    """Scores of which the first experts' are larger by up to `skew`."""
    drawn_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn_TE + torch.linspace(skew, 0, E, dtype=torch.float64)


def balance(probability: list[list[float]], chosen: list[list[int]]) -> float:
    """E sum f P."""
    total = sum(len(row) for row in chosen)
    share = [sum(row.count(e) for row in chosen) / total for e in range(E)]
    return E * sum(share[e] * fmean(row[e] for row in probability) for e in range(E))


def loss(name: str, scores_TE: Tensor, context: Context | None = None, **options: Any) -> Tensor:
    kind = find(name).load()
    router = kind(None, E, kind.Options(**options)).double()
    found: Tensor = router.route(scores_TE, context or Context(training=True)).aux_loss
    return found


def squared_cv(values: list[float]) -> float:
    return pvariance(values) / fmean(values) ** 2


def test_the_balance_is_one_where_all_is_even_and_more_where_it_is_not() -> None:
    even_TE, index_TK = torch.full((E, E), 1 / E), torch.arange(E)[:, None]
    assert load_balancing(even_TE, index_TK).item() == pytest.approx(1)
    one_TE = torch.nn.functional.one_hot(torch.zeros(E, dtype=torch.int64), E).float()
    assert load_balancing(one_TE, torch.zeros(E, 1, dtype=torch.int64)).item() == pytest.approx(E)


@pytest.mark.parametrize("name", ["switch", "mixtral", "olmoe", "gpt-oss", "grin", "gemma4"])
def test_balance_over_all_choices(name: str) -> None:
    options = {"aux_loss": 1.0, **({"z_loss": 0.0} if name == "olmoe" else {})}
    scores_TE, k = scores(), find(name).load().Options().top_k
    context = Context(training=True, generator=torch.Generator().manual_seed(0))
    kind = find(name).load()
    routing = kind(None, E, kind.Options(**options)).double().route(scores_TE, context)
    chosen = routing.index_TK if name == "grin" else scores_TE.topk(k).indices
    assert routing.aux_loss.item() == pytest.approx(balance(scores_TE.softmax(1).tolist(), chosen.tolist()))


@pytest.mark.parametrize("name", ["gshard", "minimax-01", "topology"])
def test_balance_over_first_choices(name: str) -> None:
    scores_TE = scores()
    expected = balance(scores_TE.softmax(1).tolist(), scores_TE.topk(1).indices.tolist())
    assert loss(name, scores_TE, aux_loss=1.0).item() == pytest.approx(expected)
    assert expected != pytest.approx(balance(scores_TE.softmax(1).tolist(), scores_TE.topk(2).indices.tolist()))


def test_the_z_loss() -> None:
    scores_TE = scores()
    expected = fmean(math.log(sum(math.exp(value) for value in row)) ** 2 for row in scores_TE.tolist())
    assert z_loss(scores_TE).item() == pytest.approx(expected)
    assert loss("st-moe", scores_TE, aux_loss=0.0, z_loss=2.0).item() == pytest.approx(2 * expected)
    assert loss("olmoe", scores_TE, aux_loss=0.0, z_loss=2.0).item() == pytest.approx(2 * expected)


def test_the_balance_of_each_sequence() -> None:
    """DeepSeek-V3's, over sigmoids divided by their sum; uneven sequences weigh the same."""
    scores_TE, sequence_T = scores(), torch.tensor([0] * 5 + [1] * 18 + [2] * 7)
    share_TE = scores_TE.sigmoid() / scores_TE.sigmoid().sum(1, keepdim=True)
    index_TK = scores_TE.topk(2).indices
    parts = [(share_TE[sequence_T == s].tolist(), index_TK[sequence_T == s].tolist()) for s in range(3)]
    expected = fmean(balance(*part) for part in parts)
    context = Context(training=True, sequence_T=sequence_T)
    found = loss("deepseek-v3", scores_TE, context, top_k=2, groups=1, top_groups=1, aux_loss=1.0)
    assert found.item() == pytest.approx(expected)
    assert sequence_load_balancing(share_TE, index_TK, None).item() != pytest.approx(expected)


def test_the_balance_of_sequences_counts_the_best_scores_and_not_what_bias_and_nodes_made_of_them() -> None:
    """DeepSeek-V3, eq. 18."""
    scores_TE = scores()
    plain = loss("deepseek-v3", scores_TE, top_k=2, groups=1, top_groups=1, aux_loss=1.0)
    kind = find("deepseek-v3").load()
    router = kind(None, E, kind.Options(top_k=2, groups=4, top_groups=1, aux_loss=1.0)).double()
    router.bias[0] = 1.0
    found = router.route(scores_TE, Context(training=True))
    assert (found.index_TK == 0).any(1).all() and found.aux_loss.item() == pytest.approx(plain.item())


def test_the_balances_of_devices_and_of_what_is_sent_to_them() -> None:
    scores_TE, groups, open_groups = scores(), 4, 2
    router = DeepSeekV2(None, E, DeepSeekV2Options(top_k=3, groups=groups, top_groups=open_groups))
    chosen = router.route(scores_TE, Context()).index_TK.tolist()
    probability = scores_TE.softmax(1).tolist()
    mean = [fmean(row[e] for row in probability) for e in range(E)]
    devices = communication = 0.0
    for device in range(groups):
        own = [2 * device, 2 * device + 1]
        frequency = [E / (3 * T) * sum(e in row for row in chosen) for e in own]
        sent = sum(any(e in row for e in own) for row in chosen)
        devices += fmean(frequency) * sum(mean[e] for e in own)
        communication += groups / (open_groups * T) * sent * sum(mean[e] for e in own)
    options = {"top_k": 3, "groups": groups, "top_groups": open_groups, "aux_loss": 0.0}
    found = loss("deepseek-v2", scores_TE, **options, device_loss=1.0, communication_loss=0.0)
    assert found.item() == pytest.approx(devices)
    found = loss("deepseek-v2", scores_TE, **options, device_loss=0.0, communication_loss=1.0)
    assert found.item() == pytest.approx(communication)
    found = loss("deepseek-moe", scores_TE, top_k=3, groups=1, device_loss=1.0, aux_loss=0.0)
    assert found.item() == pytest.approx(1)  # one device has everything


def test_experts_that_compute_nothing_count_less() -> None:
    """MoE++: sum eta f P with f over tokens, eta 1 for experts that compute and tau for the others."""
    kind = find("moe-plus-plus").load()
    scores_TE = scores()
    found = kind(None, 4, kind.Options(aux_loss=1.0)).route(scores_TE, Context(training=True)).aux_loss
    chosen, p_TE = scores_TE.topk(2).indices.tolist(), scores_TE.softmax(1)
    terms = [sum(e in row for row in chosen) / T * p_TE[:, e].mean().item() for e in range(E)]
    assert found.item() == pytest.approx(sum(terms[:4]) + 0.75 * sum(terms[4:]))


def test_v_moe_wants_even_importance_and_even_chances() -> None:
    scores_TE = scores()
    drawn_TE = torch.empty_like(scores_TE).normal_(generator=torch.Generator().manual_seed(7))
    noisy_TE = scores_TE + drawn_TE / E
    importance = squared_cv([fmean(row[e] for row in scores_TE.softmax(1).tolist()) for e in range(E)])
    threshold = noisy_TE.topk(2).values[:, 1].tolist()
    chance = [
        [1 - NormalDist().cdf((t - value) * E) for value in row]
        for row, t in zip(scores_TE.tolist(), threshold, strict=True)
    ]
    load = squared_cv([fmean(row[e] for row in chance) for e in range(E)])
    context = Context(training=True, generator=torch.Generator().manual_seed(7))
    assert loss("v-moe", scores_TE, context, aux_loss=1.0).item() == pytest.approx((importance + load) / 2)


@pytest.mark.parametrize("name", ["v-moe", "e3", "adamv-moe"])
def test_without_noise_importance_counts_alone(name: str) -> None:
    context = Context(training=True, task_T=torch.zeros(T, dtype=torch.int64))
    options = {"members": 1} if name == "e3" else {}
    importance = squared_cv([fmean(row[e] for row in scores().softmax(1).tolist()) for e in range(E)])
    found = loss(name, scores(), context, aux_loss=1.0, noise=0.0, **options)
    assert found.item() == pytest.approx(importance)


def noisy(seed: int, importance: float, load: float) -> tuple[NoisyTopK, Tensor]:
    torch.manual_seed(seed)
    options = NoisyTopKOptions(top_k=2, init=0.5, importance_loss=importance, aux_loss=load)
    return NoisyTopK(6, E, options).double(), torch.randn(T, 6, dtype=torch.float64)


def test_the_load_of_noisy_top_k_is_the_chance_to_be_chosen_again() -> None:
    """Monte Carlo: redraw one expert's noise, hold the others', and count how often it is in the top k."""
    router, hidden_TD = noisy(0, 0.0, 1.0)
    with torch.no_grad():
        clean_TE = hidden_TD @ router.weight.T
        deviation_TE = torch.nn.functional.softplus(hidden_TD @ router.noise.T) + 0.01
        drawn_TE = torch.empty_like(clean_TE).normal_(generator=torch.Generator().manual_seed(3))
        noisy_TE = clean_TE + deviation_TE * drawn_TE
        draws, load = 20_000, []
        again_NT = torch.empty(draws, T, dtype=torch.float64)
        for e in range(E):
            others_TE = noisy_TE.clone()
            others_TE[:, e] = -math.inf
            needed_T = others_TE.topk(2).values[:, 1]
            again_NT.normal_(generator=torch.Generator().manual_seed(e))
            chance_T = (clean_TE[:, e] + deviation_TE[:, e] * again_NT > needed_T).double().mean(0)
            load.append(chance_T.sum().item())
        context = Context(training=True, generator=torch.Generator().manual_seed(3))
        found = router(hidden_TD, context).aux_loss.item()
    assert found == pytest.approx(squared_cv(load), rel=0.02)
    assert fmean(load) == pytest.approx(2 * T / E, rel=0.2)


def test_the_importance_of_noisy_top_k() -> None:
    router, hidden_TD = noisy(1, 1.0, 0.0)
    routing = router(hidden_TD, Context(training=True, generator=torch.Generator().manual_seed(3)))
    sums = [
        sum(
            weight
            for row, weights in zip(routing.index_TK.tolist(), routing.weight_TK.tolist(), strict=True)
            for chosen, weight in zip(row, weights, strict=True)
            if chosen == e
        )
        for e in range(E)
    ]
    assert routing.aux_loss.item() == pytest.approx(squared_cv(sums))


def test_a_chosen_expert_whose_gate_rounds_to_nothing_is_chosen_all_the_same() -> None:
    """Its chance to be chosen again is against the third, not against itself."""
    router = NoisyTopK(1, 4, NoisyTopKOptions(top_k=2, importance_loss=0.0, aux_loss=1.0))
    with torch.no_grad():
        router.weight[:, 0], router.noise[:, 0] = torch.tensor([600.0, 400.0, 200.0, 0.0]), -1000.0
    found = router(torch.ones(5, 1), Context(training=True))
    assert (found.weight_TK[:, 1] == 0).all() and found.aux_loss.item() == pytest.approx(squared_cv([5, 5, 0, 0]))


def test_noisy_top_k_of_all_experts_has_an_even_load() -> None:
    router = NoisyTopK(6, 2, NoisyTopKOptions(top_k=2, importance_loss=0.0))
    assert router(torch.randn(5, 6), Context(training=True)).aux_loss == 0


def test_noisy_top_k_starts_from_noise_alone() -> None:
    router, context = NoisyTopK(6, E), Context(training=True, generator=torch.Generator().manual_seed(0))
    load_E = router(torch.randn(4000, 6), context).index_TK.flatten().bincount(minlength=E)
    assert not router.weight.any() and load_E.max() < 1.1 * load_E.double().mean()
    with pytest.raises(ValueError, match="from hidden states"):
        NoisyTopK(None, E).route(scores(), Context(training=True))


SPREAD = {"deepseek-v2": {"groups": 4}, "deepseek-v3": {"groups": 1, "top_groups": 1}}


BALANCED = "switch gshard v-moe mixtral olmoe gpt-oss llama4 grin minimax-01 topology gemma4 deepseek-moe deepseek-v2"


@pytest.mark.parametrize("name", [*BALANCED.split(), "deepseek-v3"])
def test_a_step_down_the_loss_evens_the_probabilities(name: str) -> None:
    scores_TE = scores(skew=2.0).requires_grad_()
    options: dict[str, Any] = {"top_k": 2, "aux_loss": 1.0, **SPREAD.get(name, {})}
    options |= {"z_loss": 0.0} if hasattr(find(name).load().Options(), "z_loss") else {}
    context = Context(training=True, generator=torch.Generator().manual_seed(0))
    (step_TE,) = torch.autograd.grad(loss(name, scores_TE, context, **options), scores_TE)
    before_E, after_E = (s_TE.softmax(1).mean(0) for s_TE in (scores_TE.detach(), scores_TE.detach() - 3 * step_TE))
    assert after_E.std() < before_E.std()


def test_the_load_of_a_global_batch_is_that_of_all_processes() -> None:
    """Here the other process has the mirror image of the load, so that all is even: only then is the loss 1."""
    index_TK, probability_TE = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([[0.9, 0.1]] * 4)

    def add_the_other(load_E: Tensor) -> None:
        load_E += load_E.flip(0)

    with (
        mock.patch.object(distributed, "is_initialized", lambda: True),
        mock.patch.object(distributed, "all_reduce", add_the_other),
    ):
        assert load_balancing(probability_TE, index_TK, everywhere=True).item() == pytest.approx(1)
        assert load_balancing(probability_TE, index_TK).item() == pytest.approx(1.8)
    assert load_balancing(probability_TE, index_TK, everywhere=True).item() == pytest.approx(1.8)
