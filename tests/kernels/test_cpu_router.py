"""The router's compiled loops against float64: choices, ties, NaN, weights, gradients, threads; and without numba."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import check_route

from moe_kernels import reference, route, router, target, top
from moe_kernels.cpu import router as loops

DEEPSEEK = {"score": "sigmoid", "groups": 8, "top_groups": 4, "renormalise": True, "scale": 2.5}


def logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_router(data: Any) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = data.draw(st.integers(2, 40))
    top_groups = data.draw(st.integers(1, groups))
    bias = logits(1, groups * size, 1)[0] / 4 if data.draw(st.booleans()) else None
    renormalise = data.draw(st.booleans())
    least = 1 + renormalise  # of one choice that is divided by itself the gradient is 0, but for rounding
    logits_TE = logits(data.draw(st.integers(1, 20)), groups * size, data.draw(st.integers(0, 99)))
    top_k = data.draw(st.integers(least, min(20, size * top_groups)))
    options = {
        "score": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "groups": groups,
        "top_groups": top_groups,
        "group_score": data.draw(st.sampled_from(["top2", "max"])),
        "renormalise": renormalise,
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
    }
    check_route(logits_TE, top_k, selection_bias_E=bias, **options, tolerance=5e-6)
    with torch.no_grad():  # the weights of the loop itself, which with a gradient are torch's
        index, weight = route(logits_TE.requires_grad_(), top_k, selection_bias_E=bias, **options)
    bias_E = None if bias is None else bias.double()
    expected, truth = reference.route(logits_TE.double(), top_k, selection_bias_E=bias_E, **options)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight.double(), truth.detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type(dtype: torch.dtype) -> None:
    given_TE, bias_E = logits(40, 64).to(dtype), logits(1, 64, 1)[0] / 4
    index, weight = route(given_TE, 8, **DEEPSEEK, selection_bias_E=bias_E)
    expected, truth = reference.route(given_TE.double(), 8, **DEEPSEEK, selection_bias_E=bias_E.double())
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight.double(), truth, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)


def test_float64_is_not_for_the_gpus_kernel() -> None:
    with mock.patch.object(target, "uses_triton", lambda _: True), mock.patch.object(router, "_operator") as kernel:
        route(logits(4, 8).double(), 2)
    assert kernel.call_count == 0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 4), st.integers(0, 99))
def test_the_top_is_that_of_a_stable_sort(length: int, top_k: int, different: int, seed: int) -> None:
    """Of few different values, minus infinity among them: most are equal."""
    values = torch.randint(0, different, (7, length), generator=torch.Generator().manual_seed(seed)).float().log()
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :top_k]
    assert np.array_equal(top(values, top_k).numpy(), expected)


@pytest.mark.parametrize("length, top_k", [(5, 4), (64, 4), (64, 2), (3, 1)])
def test_of_a_row_with_nan_the_places_are_in_range(length: int, top_k: int) -> None:
    values = logits(30, length)
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < torch.arange(30)[:, None] / 29] = (
        torch.nan
    )
    index = top(values, top_k)
    assert ((index >= 0) & (index < length)).all() and all(len(set(row)) == top_k for row in index.tolist())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as torch may use, and worth starting for any work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with mock.patch.object(loops, "WORTH_A_THREAD", 1):
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_share_the_tokens() -> None:
    shared = []

    def seen(*given: Any) -> None:
        shared.append(given[-2:])
        one(*given)

    one = loops._choose
    with mock.patch.object(loops, "_choose", seen):
        index, weight = route(logits(41, 64), 6, renormalise=True)
    assert sorted(shared) == [(0, 20), (20, 41)]
    expected, truth = reference.route(logits(41, 64).double(), 6, renormalise=True)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight.double(), truth, rtol=1e-6, atol=0)
    assert torch.equal(top(logits(41, 64), 6), expected)


def test_no_tokens_and_strides() -> None:
    assert [part.shape for part in route(torch.empty(0, 8), 2)] == [(0, 2), (0, 2)]
    assert top(torch.empty(0, 5), 2).shape == (0, 2)
    assert top(torch.empty(2, 3, 4), 2).shape == (2, 3, 2)
    assert top(torch.empty(3, 5), 0).shape == (3, 0)
    check_route(logits(8, 36).T, 3)
    check_route(logits(9, 80)[::2, ::2], 3)


def test_without_numba_it_is_the_same() -> None:
    bias_E = logits(1, 64, 1)[0] / 4
    index, weight = route(logits(20, 64), 8, **DEEPSEEK, selection_bias_E=bias_E)
    with mock.patch.object(router, "_compiled", lambda: None):
        expected, truth = route(logits(20, 64), 8, **DEEPSEEK, selection_bias_E=bias_E)
        assert torch.equal(top(logits(20, 64), 8), logits(20, 64).topk(8).indices)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight, truth)


def test_it_compiles_to_one_graph() -> None:
    def both(logits_TE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *route(logits_TE, 3), top(logits_TE, 3)

    found = torch.compile(both, backend="eager", fullgraph=True)(logits(6, 16))
    for one, other in zip(found, both(logits(6, 16)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrong", ["a weight", "the order"])
def test_a_wrong_loop_is_seen(wrong: str) -> None:
    def planted(*args: Any) -> Any:
        index, weight = honest(*args)
        return (index, weight * 1.0001) if wrong == "a weight" else (index.flip(1), weight.flip(1))

    honest = loops.choose
    with mock.patch.object(loops, "choose", planted), pytest.raises(AssertionError):
        test_every_type(torch.float32)
