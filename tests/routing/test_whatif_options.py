"""Options of every what-if: what is no number for them is refused by name, and what is taken is answered in numbers."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from small_traces import random_trace

from moectl.errors import InputError, UsageError
from moectl.routing.whatif.registry import WHAT_IFS
from moectl.routing.whatif.replay import Settings
from moectl.spelling import filled


def numbers() -> list[tuple[str, str]]:
    """Every what-if with every option of it that is a number."""
    return [
        (each.name, field.name)
        for each in WHAT_IFS
        for field in fields(each.load().Options)
        if type(field.default) in (int, float)
    ]


@pytest.mark.parametrize(("name", "option"), numbers())
def test_what_is_no_number_for_it_is_refused_by_name(name: str, option: str) -> None:
    kind = next(each for each in WHAT_IFS if each.name == name).load().Options
    for text in ("-1", "nan", "inf", "1e300", "9" * 20):
        with pytest.raises(UsageError, match=option):
            filled(kind, {option: text}, name)


@pytest.mark.parametrize(("name", "option"), numbers())
def test_zero_is_refused_or_answered(name: str, option: str) -> None:
    module = next(each for each in WHAT_IFS if each.name == name).load()
    try:
        options = filled(module.Options, {option: "0"}, name)
    except UsageError as error:
        assert option in error.what and f"{option}=" in error.fix
        return
    finding = module.run(random_trace(3, [40, 40], 8, 2), options)
    json.dumps([finding.rows, dict(finding.detail)], allow_nan=False)


@pytest.mark.parametrize(("name", "option"), numbers())
def test_a_billion_is_refused_or_answered_in_no_more_memory(name: str, option: str) -> None:
    module = next(each for each in WHAT_IFS if each.name == name).load()
    try:
        options = filled(module.Options, {option: "1000000000"}, name)
    except UsageError as error:
        assert option in error.what
        return
    finding = module.run(random_trace(3, [40, 40], 8, 2), options)
    json.dumps([finding.rows, dict(finding.detail)], allow_nan=False)


@pytest.mark.parametrize("name", [each.name for each in WHAT_IFS])
def test_a_layer_whose_experts_all_compute_nothing_is_refused(name: str) -> None:
    traced, module = random_trace(3, [40, 40], 8, 2), next(each for each in WHAT_IFS if each.name == name).load()
    skips = replace(traced.layers[0], point=replace(traced.layers[0].point, null_experts=8))
    with pytest.raises(InputError, match="No expert"):
        module.run(replace(traced, layers=(traced.layers[1], skips)), module.Options())


def test_a_replay_routes_some_tokens_together() -> None:
    with pytest.raises(UsageError, match="batch_tokens"):
        filled(Settings, {"batch_tokens": "0"}, "A replay")
