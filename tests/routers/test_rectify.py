"""Rectify-Router: what it repairs, by hand. Legend: T tokens, E experts."""

from __future__ import annotations

import pytest
import torch

from moectl.routers.protocol import Context, counts
from moectl.routers.rectify import Rectify, RectifyOptions


def crowd(tokens: int = 64, num_experts: int = 8) -> torch.Tensor:
    """Scores of tokens that all like the same experts, more or less."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(tokens, num_experts, generator=draw) - torch.arange(num_experts)


def route(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
    found = Rectify(None, 8, RectifyOptions(**options)).route(crowd(), Context())
    return found.index_TK, found.dropped_TK


def test_a_dropped_choice_stays_on_its_gpu() -> None:
    plain_TK, dropped_TK = route(intra=False, fill=0)
    index_TK, left_TK = route(intra=True, fill=0)
    assert dropped_TK.sum() > 30 and not left_TK.any()
    home_T1 = (torch.arange(64) * 4 // 64)[:, None].expand(-1, 2)
    assert torch.equal(index_TK[dropped_TK] // 2, home_T1[dropped_TK])
    assert torch.equal(index_TK[~dropped_TK], plain_TK[~dropped_TK])


def test_padding_takes_the_most_probable_next_choice() -> None:
    index_TK, dropped_TK = route(intra=False, fill=1)
    probability_TE, order_TE = crowd().softmax(1), crowd().argsort(1, descending=True)
    load_E = counts(index_TK[:, :2], 8)
    for expert in range(8):
        asking_T = order_TE[:, 2] == expert
        filled_T = index_TK[:, 2] == expert
        assert int(filled_T.sum()) == min(16 - int(load_E[expert]), int(asking_T.sum()))
        if filled_T.any() and (asking_T & ~filled_T).any():
            probability_T = probability_TE[:, expert]
            assert probability_T[filled_T].min() >= probability_T[asking_T & ~filled_T].max()
    assert (index_TK[:, 2] >= 0).sum() > 10 and not dropped_TK[:, 2].any()


def test_more_of_the_probability_is_served() -> None:
    def mass(**options: object) -> float:
        return float(Rectify(None, 8, RectifyOptions(**options)).route(crowd(), Context()).weight_TK.sum())

    plain, stay, fill = mass(intra=False, fill=0), mass(fill=0), mass(intra=False)
    assert plain < min(stay, fill) < max(stay, fill) < mass()


def test_gpus_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide 8"):
        Rectify(None, 8, RectifyOptions(groups=3))
