"""Kool's estimators are unbiased: the mean weight at an expert is its probability, and so are gradients.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moectl.routers import kool
from moectl.routers.kool import Kool, KoolOptions
from moectl.routers.protocol import NO_EXPERT, Context, counts

T, E, DRAWS = 4, 2, 3000


def scores() -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.5, 0.0], [2.0, 0.0], [-0.5, 0.0]], dtype=torch.float64).requires_grad_()


def mean_weight(router: Kool, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Over draws the weight at each expert, and how far the mean is from it by chance, both [T, E]."""
    context = Context(training=True, generator=torch.Generator().manual_seed(0))
    drawn = []
    for _ in range(DRAWS):
        found = router.route(scores_TE, context)
        assert counts(found.index_TK, E).max() <= 2
        drawn.append(
            torch.zeros(T, E, dtype=torch.float64).scatter_add(1, found.index_TK.clamp(min=0), found.weight_TK)
        )
    drawn_NTE = torch.stack(drawn)
    return drawn_NTE.mean(0), drawn_NTE.detach().std(0) / DRAWS**0.5


@pytest.mark.parametrize("estimator", ["balanced", "skip"])
def test_weights_and_gradients_are_right_on_average(estimator: str) -> None:
    scores_TE = scores()
    mean_TE, error_TE = mean_weight(Kool(None, E, KoolOptions(estimator=estimator)), scores_TE)
    probability_TE = scores_TE.softmax(1)
    assert ((mean_TE - probability_TE).abs() < 4 * error_TE + 1e-9).all()
    value_TE = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    found = torch.autograd.grad((mean_TE * value_TE).sum(), scores_TE)[0]
    exact = torch.autograd.grad((probability_TE * value_TE).sum(), scores_TE)[0]
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0)


def test_a_chance_that_forgets_the_others_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kool, "losses_of_moving", lambda scores_TE, *_: torch.zeros(E, E))
    mean_TE, error_TE = mean_weight(Kool(None, E), scores())
    assert ((mean_TE - scores().softmax(1)).abs() > 4 * error_TE).any()


def test_the_balanced_estimator_fills_all_places_and_the_other_leaves_tokens_out() -> None:
    context = Context(training=True, generator=torch.Generator().manual_seed(1))
    scores_TE = torch.randn(64, 8, generator=context.generator)
    assert counts(Kool(None, 8).route(scores_TE, context).index_TK, 8).tolist() == [8] * 8
    found = Kool(None, 8, KoolOptions(estimator="skip")).route(scores_TE, context)
    assert found.dropped_TK.any() and torch.equal(found.dropped_TK, found.index_TK == NO_EXPERT)


def test_another_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="neither balanced nor skip"):
        Kool(None, 8, KoolOptions(estimator="both"))
