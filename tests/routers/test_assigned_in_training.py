"""What BASE and S-BASE do in training: even loads, the best sum, even marginals. Legend: T tokens, E experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moectl.routers.base import Base
from moectl.routers.kool import Kool
from moectl.routers.mone import Mone
from moectl.routers.protocol import Context, counts
from moectl.routers.s_base import SBase, SBaseOptions, sinkhorn
from moectl.routers.single import Single

TRAINING = Context(training=True)


def skewed(tokens: int, num_experts: int = 8) -> Tensor:
    """Scores that nearly all like the first experts."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(tokens, num_experts, generator=draw, dtype=torch.float64) - torch.arange(num_experts)


def test_base_gives_each_expert_as_many_tokens_at_the_best_sum_of_scores() -> None:
    scores_TE = skewed(512)
    index_T1 = Base(None, 8).route(scores_TE, TRAINING).index_TK
    assert counts(index_T1, 8).tolist() == [64] * 8
    wide = np.repeat(scores_TE.numpy(), 64, axis=1)
    rows, columns = linear_sum_assignment(wide, maximize=True)
    assert float(scores_TE.gather(1, index_T1).sum()) == pytest.approx(wide[rows, columns].sum(), rel=1e-12)


def test_base_in_use_is_uneven_where_scores_are() -> None:
    assert counts(Base(None, 8).route(skewed(512), Context()).index_TK, 8).max() > 200


def test_base_begins_with_orthogonal_centroids() -> None:
    weight_ED = Base(16, 8).weight.detach()
    torch.testing.assert_close(weight_ED @ weight_ED.t(), 0.01 * torch.eye(8), atol=1e-6, rtol=0)


def test_the_plan_has_even_marginals() -> None:
    plan_TE = sinkhorn(skewed(96), 1e-9, 1000).exp()
    torch.testing.assert_close(plan_TE.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(plan_TE.sum(1), torch.full((96,), 1 / 96, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_plan_is_that_of_scaling_rows_and_columns_in_turn() -> None:
    """As in Megatron-LM, without logarithms, in numpy."""
    scores_TE = skewed(96)
    kernel_TE = np.exp(scores_TE.numpy())
    column_E = np.ones(8)
    for _ in range(500):
        row_T = 1 / 96 / (kernel_TE @ column_E)
        column_E = 1 / 8 / (row_T @ kernel_TE)
    np.testing.assert_allclose(sinkhorn(scores_TE, 1e-12, 1000).exp(), row_T[:, None] * kernel_TE * column_E, rtol=1e-8)


@pytest.mark.parametrize("top_k", [1, 2])
def test_s_base_chooses_by_the_plan_and_weighs_by_the_scores(top_k: int) -> None:
    scores_TE = skewed(512)
    found = SBase(None, 8, SBaseOptions(top_k=top_k)).route(scores_TE, TRAINING)
    expected_TK = sinkhorn(scores_TE).topk(top_k).indices
    assert torch.equal(found.index_TK, expected_TK)
    share_TE = scores_TE.sigmoid() if top_k == 1 else scores_TE.softmax(1)
    torch.testing.assert_close(found.weight_TK, share_TE.gather(1, expected_TK))
    load_E, greedy_E = (counts(index, 8) for index in (expected_TK, scores_TE.topk(top_k).indices))
    assert load_E.max() < 1.6 * load_E.double().mean() < 0.5 * greedy_E.max()


@pytest.mark.parametrize("kind", [Base, Kool, Mone])
def test_more_than_one_expert_per_token_is_refused(kind: type[Single]) -> None:
    with pytest.raises(ValueError, match="gives a token one expert"):
        kind(None, 8, kind.Options(top_k=2))
