"""The choice that routers share: its order among equals, and that the kernel and its reference choose the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moectl.routers.choice import choose
from moectl.routers.protocol import Context, top
from moectl.routers.registry import find

WAYS: list[dict[str, Any]] = [
    {},
    {"normalize": True},
    {"score": "sigmoid", "scale": 2.5},
    {"score": "sigmoid", "bias_E": torch.linspace(-0.2, 0.2, 16), "groups": 4, "top_groups": 2, "normalize": True},
    {"groups": 4, "top_groups": 2, "group_score": "max", "scale": 16.0},
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_the_lower_number_comes_first_among_equals(rows: list[list[int]], top_k: int) -> None:
    expected = [sorted(range(6), key=lambda e: (-row[e], e))[:top_k] for row in rows]
    assert top(torch.tensor(rows, dtype=torch.float), top_k).tolist() == expected


def test_of_no_rows_and_of_rows_with_nan_the_numbers_are_in_range() -> None:
    assert top(torch.empty(0, 6), 2).shape == (0, 2) and top(torch.empty(0, 3, 6), 2).shape == (0, 3, 2)
    scores_TE = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [torch.nan] * 4])
    index_TK = top(scores_TE, 3)
    assert ((index_TK >= 0) & (index_TK < 4)).all() and all(len(set(row)) == 3 for row in index_TK.tolist())


def planted_kernel() -> Any:
    """Inside, the reference is in the kernel's place."""
    return mock.patch.object(moe_kernels, "route", side_effect=reference.route)


def renamed(way: dict[str, Any]) -> dict[str, Any]:
    names = {"normalize": "renormalise", "bias_E": "selection_bias_E"}
    return {names.get(name, name): value for name, value in way.items()}


@pytest.mark.parametrize("way", WAYS, ids=[" ".join(way) or "plain" for way in WAYS])
def test_it_is_the_choice_of_the_kernel(way: dict[str, Any]) -> None:
    """Against the reference of `moe_kernels`, in float64, with gradients; and what the kernel is given."""
    scores_TE = torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index_TK, weight_TK = choose(scores_TE, 3, **way)
    expected_index_TK, expected_weight_TK = reference.route(scores_TE, 3, **renamed(way))
    assert torch.equal(index_TK, expected_index_TK)
    torch.testing.assert_close(weight_TK, expected_weight_TK)
    mix_TK = torch.randn(30, 3, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((w_TK * mix_TK).sum(), scores_TE)[0] for w_TK in (weight_TK, expected_weight_TK)
    )
    torch.testing.assert_close(found, expected)

    short_TE = scores_TE.detach().float()
    with planted_kernel() as kernel:
        fused_index_TK, fused_weight_TK = choose(short_TE, 3, **way)
    assert kernel.call_count == 1
    assert torch.equal(fused_index_TK, index_TK)
    torch.testing.assert_close(fused_weight_TK.double(), weight_TK.detach(), atol=1e-5, rtol=1e-5)


FUSED = ["switch", "gshard", "mixtral", "olmoe", "gpt-oss", "llama4", "deepseek-moe", "deepseek-v2", "deepseek-v3"]


@pytest.mark.parametrize("name", [*FUSED, "loss-free", "minimax-01", "gemma4", "limoe", "evo-moe"])
def test_a_router_gives_its_own_choice_to_the_kernel(name: str) -> None:
    """One call of the kernel, and the same routing as without it."""
    kind = find(name).load()
    router, scores_TE = kind(None, 64), torch.randn(40, 64)
    plain = router.route(scores_TE, Context())
    with planted_kernel() as kernel:
        fused = router.route(scores_TE, Context())
    assert kernel.call_count == 1 and torch.equal(fused.index_TK, plain.index_TK)
    torch.testing.assert_close(fused.weight_TK, plain.weight_TK)


def test_groups_of_one_expert_are_ranked_by_it() -> None:
    """DeepSeek-V3's 8 groups of 8 experts."""
    scores_TE: Tensor = torch.randn(20, 8)
    index_TK, _weight_TK = choose(scores_TE, 2, score="sigmoid", groups=8, top_groups=4)
    assert torch.equal(index_TK, scores_TE.topk(2).indices)
