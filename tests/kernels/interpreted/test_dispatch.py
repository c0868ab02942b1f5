"""The counting sort on the device against a stable sort."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import check_dispatch

from moe_kernels import dispatch
from moe_kernels.gpu import dispatch as kernels


def ids(tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Ids with some that nobody here takes."""
    return torch.randint(-1, experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 1, 1), (5, 7, 2), (3, 200, 4), (30, 64, 3), (1, 300, 8)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_one_launch(tokens: int, experts: int, top_k: int, block_m: int) -> None:
    check_dispatch(ids(tokens, experts, top_k), experts, block_m)


@pytest.mark.parametrize("tokens, experts, top_k", [(100, 7, 2), (41, 33, 3), (300, 5, 1)])
def test_three_launches(tokens: int, experts: int, top_k: int) -> None:
    """Blocks of 16 ids instead of 1024, so that a small batch has many."""
    with mock.patch.object(kernels, "IDS", 16):
        check_dispatch(ids(tokens, experts, top_k), experts, 16)


def test_a_large_batch_at_the_real_block() -> None:
    check_dispatch(ids(700, 12, 2), 12, 64)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 4), st.sampled_from([16, 32]), st.integers(0, 99))
def test_any_batch(tokens: int, experts: int, top_k: int, block_m: int, seed: int) -> None:
    with mock.patch.object(kernels, "IDS", 32):
        check_dispatch(ids(tokens, experts, top_k, seed), experts, block_m)


def test_all_rows_to_one_expert_and_to_none() -> None:
    check_dispatch(torch.full((50, 2), 3), 9, 16)
    check_dispatch(torch.full((50, 2), 9), 9, 16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_other_integers(dtype: torch.dtype) -> None:
    check_dispatch(torch.randint(0, 7, (20, 2), generator=torch.Generator().manual_seed(0)).to(dtype), 5, 16)


def test_an_id_is_not_cut_to_32_bits() -> None:
    check_dispatch(torch.tensor([[1, 2**32 + 1], [-(2**63), 3]]), 5, 16)


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="32767"):
        dispatch(torch.zeros(4, 1, dtype=torch.int64), 40_000)


def test_an_unstable_sort_is_seen() -> None:
    """With positions counted backwards the order within an expert turns round, and the check fails."""
    honest = kernels.sort_ids

    def backwards(ids, IDS):  # type: ignore[no-untyped-def]
        expert, position = honest.fn(ids, IDS)
        return expert, IDS - 1 - position

    with mock.patch.object(kernels, "sort_ids", backwards), pytest.raises(AssertionError):
        check_dispatch(torch.zeros(8, 2, dtype=torch.int64), 3, 16)
