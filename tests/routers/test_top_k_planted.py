"""Errors planted in routers that take the top of a softmax or sigmoid: each is seen by its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases_top_k import CASES
from test_every_router import test_a_float64_reference_chooses_the_same as compare

from moectl.routers import (
    capacity,
    choice,
    deepseek_v2,
    deepseek_v3,
    grin,
    softmax_top_k,
    switch,
    topology,
    v_moe,
    zaya,
)

PLANTED: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "a place more": ("switch", switch, "capacity", lambda *given: capacity.capacity(*given) + 1),
    "no priority": ("v-moe", v_moe, "kept", lambda *given: capacity.kept(*given[:3])),
    "groups by their best": (
        *("deepseek-v3", deepseek_v3, "choose"),
        lambda scores_TE, k, **options: choice.choose(scores_TE, k, **options | {"group_score": "max"}),
    ),
    "groups by their two best": (
        *("deepseek-v2", deepseek_v2, "choose"),
        lambda scores_TE, k, **options: choice.choose(scores_TE, k, **options | {"group_score": "top2"}),
    ),
    "the worst first": (
        *("mixtral", softmax_top_k, "choose"),
        lambda scores_TE, k, **options: tuple(each.flip(1) for each in choice.choose(scores_TE, k, **options)),
    ),
    "one more may leave": ("topology", topology, "int", lambda value: int(value) + 1),
    "the approximate gelu": (
        *("zaya", zaya.nn.functional, "gelu"),
        lambda x, gelu=torch.nn.functional.gelu: gelu(x, approximate="tanh"),
    ),
    "half the threshold": ("grin", grin.torch, "maximum", lambda x, y, of=torch.maximum: of(x, y) * 2),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_is_seen(what: str) -> None:
    name, module, attribute, wrong = PLANTED[what]
    case = next(case for case in CASES if case.name == name)
    compare(case)
    with mock.patch.object(module, attribute, wrong, create=attribute == "int"), pytest.raises(AssertionError):
        compare(case)
