"""The router's kernels against float64: choices, ties, weights, gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import check_route

from moe_kernels import reference, route
from moe_kernels.gpu import router

DEEPSEEK = {"score": "sigmoid", "groups": 8, "top_groups": 4, "renormalise": True, "scale": 2.5}
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "softmax": (5, 64, 8, {}),
    "renormalised, experts no power of two": (7, 60, 6, {"renormalise": True}),
    "deepseek-v3": (9, 256, 8, DEEPSEEK),
    "deepseek-v2, groups no power of two": (4, 60, 4, {"groups": 6, "top_groups": 2, "group_score": "max"}),
    "all": (3, 5, 5, {"score": "sigmoid"}),
    "one of one": (3, 1, 1, {}),
    "top 1 scaled": (4, 7, 1, {"scale": 3.0}),
}


def logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Random logits, the same every time."""
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_route(name: str, bias: bool) -> None:
    tokens, experts, top_k, options = CASES[name]
    extra = {"selection_bias_E": logits(1, experts, 9)[0] / 4} if bias else {}
    check_route(logits(tokens, experts), top_k, **options, **extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_have_float32_scores(dtype: torch.dtype) -> None:
    check_route(logits(6, 24).to(dtype), 3, renormalise=True)


def test_ties_go_to_the_lower_id() -> None:
    """Also those between 0 and -0."""
    tied = torch.randint(-1, 2, (12, 10), generator=torch.Generator().manual_seed(0)).float() * -0.0
    check_route(tied, 4, score="sigmoid")
    check_route(torch.randint(0, 2, (12, 10), generator=torch.Generator().manual_seed(1)).float(), 4)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_router(data: Any) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = data.draw(st.integers(2, 9))
    top_groups = data.draw(st.integers(1, groups))
    check_route(
        logits(data.draw(st.integers(1, 20)), groups * size, data.draw(st.integers(0, 99))),
        data.draw(st.integers(1, min(8, size * top_groups))),
        score=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        groups=groups,
        top_groups=top_groups,
        group_score=data.draw(st.sampled_from(["top2", "max"])),
        renormalise=data.draw(st.booleans()),
        tolerance=5e-6,
    )


def test_no_tokens_and_strides() -> None:
    index, weight = route(torch.empty(0, 8), 2)
    assert index.shape == weight.shape == (0, 2)
    check_route(logits(8, 6).T, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "cosine"},
        {"groups": 5},
        {"groups": 4, "top_groups": 1},
        {"group_score": "median"},
        {"groups": 12, "top_groups": 6},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"score|experts|group"):
        route(torch.zeros(2, 12), 4, **options)


@pytest.mark.parametrize("wrong", [{"renormalise": True}, {"scale": 1.001}, {"score": "sigmoid"}])
def test_another_router_is_seen(wrong: dict[str, Any]) -> None:
    def other(*args: Any, **options: Any) -> Any:
        return honest(*args, **{**options, **wrong})

    with mock.patch.object(reference, "route", other), pytest.raises(AssertionError):
        check_route(logits(6, 16), 3)


def test_a_biased_weight_is_seen() -> None:
    """The selection bias must not enter a weight."""

    def biased(*args: Any) -> Any:
        index, weight = kernel(*args)
        return index, weight + args[1][index]

    kernel = router.forward
    with mock.patch.object(router, "forward", biased), pytest.raises(AssertionError):
        check_route(logits(6, 16), 3, selection_bias_E=logits(1, 16)[0])


honest = reference.route
