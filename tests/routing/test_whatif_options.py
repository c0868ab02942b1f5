"""Options of every what-if: what is no number for them is refused by name, and what is taken is answered in numbers."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from small_traces import random_trace

from moectl.errors import UsageError
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


def test_a_replay_routes_some_tokens_together() -> None:
    with pytest.raises(UsageError, match="batch_tokens"):
        filled(Settings, {"batch_tokens": "0"}, "A replay")
