"""State that moves after a step: biases and prices bring a skewed load to balance, and are what their papers say.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

from moectl.routers.deepseek_v3 import DeepSeekV3, DeepSeekV3Options
from moectl.routers.inkling import Inkling, InklingOptions
from moectl.routers.longcat import LongCat, LongCatOptions
from moectl.routers.protocol import Context, Router, counts
from moectl.routers.quantile import Quantile, QuantileOptions
from moectl.routers.registry import find
from moectl.routers.zaya import Zaya, ZayaOptions

T, E = 512, 8
TRAINING = Context(training=True)


def skewed(seed: int, tokens: int = T) -> Tensor:
    """Scores that prefer the first experts: without a bias their load is several times the mean."""
    drawn_TE = torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))
    return drawn_TE + torch.linspace(1.5, -1.5, E)


def worst(router: Router) -> float:
    """Largest over mean load, on scores that it did not see before."""
    load_E = counts(router.route(skewed(999, 16 * T), Context()).index_TK, E).double()
    return float(load_E.max() / load_E.mean())


def test_sigmoids_that_are_all_nothing_are_shared_out_by_their_logarithms() -> None:
    """Inkling's, in float32: sigmoid(z) is exp(z) there, and both sums are 0."""
    scores_TE = skewed(0, 20) - 200
    found = Inkling(None, 6, InklingOptions(top_k=3, scale=1.0)).route(scores_TE, Context())
    assert not scores_TE.sigmoid().any()
    torch.testing.assert_close(found.weight_TK, scores_TE.gather(1, found.index_TK).softmax(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek-v3", {"top_k": 2, "groups": 4, "top_groups": 2, "bias_rate": 0.01}),
        ("loss-free", {"top_k": 2, "bias_rate": 0.01}),
        ("inkling", {"top_k": 2, "shared_experts": 0, "bias_rate": 0.01}),
        ("zaya", {"bias_rate": 0.004}),
        ("longcat", {"top_k": 2, "zero_experts": 0, "active": 2.0, "bias_rate": 0.1}),
        ("quantile", {"momentum": 0.5}),
    ],
)
def test_a_skewed_load_becomes_even(name: str, options: dict[str, Any]) -> None:
    kind = find(name).load()
    router = kind(None, E, kind.Options(**options))
    assert worst(router) > 2
    for step in range(120):
        router.after_step(counts(router.route(skewed(step), TRAINING).index_TK, E))
    assert worst(router) < 1.25


def test_the_bias_steps_by_the_sign_and_is_in_the_choice_alone() -> None:
    router = DeepSeekV3(None, 4, DeepSeekV3Options(top_k=1, groups=1, top_groups=1, bias_rate=0.25))
    router.after_step(torch.tensor([7, 1, 4, 4]))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    scores_TE = torch.tensor([[0.5, 0.4, 0.0, 0.0]])
    assert scores_TE.sigmoid().argmax() == 0
    routing = router.route(scores_TE, Context())
    assert routing.index_TK.tolist() == [[1]] and routing.weight_TK.item() == pytest.approx(2.5)


def test_longcat_asks_for_as_many_computing_experts_as_it_is_told() -> None:
    """4 of 6 experts and 4 that compute nothing: the bias finds 1.5 of 2 choices, from 1.2 where all are alike."""
    router = LongCat(None, 6, LongCatOptions(top_k=2, zero_experts=4, active=1.5, bias_rate=0.2))
    for step in range(200):
        scores_TE = torch.randn(T, 10, generator=torch.Generator().manual_seed(step))
        load_E = counts(router.route(scores_TE, TRAINING).index_TK, 10)
        if step == 0:
            assert load_E[:6].sum() / T == pytest.approx(1.2, abs=0.1)
        router.after_step(load_E)
    assert load_E[:6].sum() / T == pytest.approx(1.5, abs=0.05)
    assert not router.bias[6:].any()


def test_zaya_skips_more_where_its_skip_is_preferred() -> None:
    scores_TE = torch.randn(T, E + 1, generator=torch.Generator().manual_seed(0))
    skipped = [
        int((Zaya(None, E, ZayaOptions(skip_bias=bias)).route(scores_TE, Context()).index_TK == -1).sum())
        for bias in (-1.0, 0.0, 1.0)
    ]
    assert skipped[0] == 0 and skipped[1] == pytest.approx(T / (E + 1), rel=0.4) and skipped[2] == T


def test_a_price_is_the_quantile_that_fills_its_expert() -> None:
    """One step from nothing, against sorting: as many tokens want an expert at its new price as are to come to it."""
    router, scores_TE = Quantile(None, E, QuantileOptions(top_k=2)), skewed(0)
    router.route(scores_TE, TRAINING)
    router.after_step(torch.zeros(E))
    third_T = scores_TE.sort(1, descending=True).values[:, 2]
    over = [sorted((scores_TE[:, e] - third_T).tolist(), reverse=True)[T * 2 // E] for e in range(E)]
    assert router.beta.tolist() == pytest.approx([value - sum(over) / E for value in over], abs=1e-6)


def test_prices_of_several_calls_are_averaged_and_use_leaves_no_trace() -> None:
    one, two, both = (Quantile(None, E) for _ in range(3))
    one.route(skewed(1), TRAINING)
    two.route(skewed(2), TRAINING)
    for seed in (1, 2):
        both.route(skewed(seed), TRAINING)
        both.route(skewed(seed), TRAINING)  # again, as under gradient checkpointing
        both.route(skewed(seed + 5), Context())
    for router in (one, two, both):
        router.after_step(torch.zeros(E))
    torch.testing.assert_close(both.beta, (one.beta + two.beta) / 2)
    assert set(both.state_dict()) == {"beta"}
    before_E = both.beta.clone()
    both.after_step(torch.zeros(E))
    assert torch.equal(both.beta, before_E)
    with torch.no_grad():  # a replay has no gradients, and is training all the same
        both.route(skewed(3), TRAINING)
    both.after_step(torch.zeros(E))
    assert not torch.equal(both.beta, before_E)


def test_prices_are_those_of_all_processes() -> None:
    """The other process has found the same in two calls as this one in one, for other tokens."""
    one, other, both = (Quantile(None, E) for _ in range(3))
    one.route(skewed(1), TRAINING)
    for _ in range(2):
        other.route(skewed(2), TRAINING)
    for seed in (1, 2, 2):
        both.route(skewed(seed), TRAINING)
    theirs = iter((other.found, other.calls))
    with (
        mock.patch.object(distributed, "is_initialized", lambda: True),
        mock.patch.object(distributed, "all_reduce", lambda ours: ours.add_(next(theirs))),
    ):
        one.after_step(torch.zeros(E))
    both.after_step(torch.zeros(E))
    torch.testing.assert_close(one.beta, both.beta)


def test_prices_of_all_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to choose"):
        Quantile(None, 2)
