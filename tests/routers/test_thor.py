"""THOR's draws and its consistency loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from moectl.routers.protocol import Context, counts
from moectl.routers.thor import Thor, ThorOptions, consistency

SCORES_TE = torch.zeros(6000, 8)
SEQUENCE_T = torch.arange(6000) // 100


def draw(level: str = "token", top_k: int = 1, training: bool = False, seed: int = 0) -> torch.Tensor:
    context = Context(training, sequence_T=SEQUENCE_T, generator=torch.Generator().manual_seed(seed))
    return Thor(None, 8, ThorOptions(top_k, level)).route(SCORES_TE, context).index_TK


def test_training_takes_the_same_expert_for_a_whole_batch_and_another_for_the_next() -> None:
    taken = {tuple(draw(training=True, seed=seed).unique().tolist()) for seed in range(40)}
    assert taken == {(expert,) for expert in range(8)}


def test_in_use_a_draw_holds_for_a_token_or_a_sequence() -> None:
    assert (counts(draw(), 8) - 750).abs().max() < 4 * (6000 * 1 / 8 * 7 / 8) ** 0.5
    by_sequence = draw("sequence").view(60, 100)
    assert (by_sequence == by_sequence[:, :1]).all() and len(by_sequence[:, 0].unique()) == 8
    assert len(draw("batch").unique()) == 1


def test_several_experts_are_drawn_without_replacement_each_as_often() -> None:
    index_TK = draw(top_k=3)
    assert (index_TK.sort(1).values.diff() > 0).all()
    assert (counts(index_TK, 8) - 2250).abs().max() < 4 * (6000 * 3 / 8 * 5 / 8) ** 0.5


def test_consistency_is_the_mean_of_both_divergences() -> None:
    one_TV, two_TV = torch.randn(2, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = one_TV.log_softmax(-1), two_TV.log_softmax(-1)
    wanted = (
        kl_div(q, p, reduction="batchmean", log_target=True) + kl_div(p, q, reduction="batchmean", log_target=True)
    ) / 2
    torch.testing.assert_close(consistency(one_TV, two_TV).mean(), wanted)
    assert consistency(one_TV, one_TV + 3).abs().max() < 1e-12


def test_another_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        draw("word")
