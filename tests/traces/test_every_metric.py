"""All metrics at once: no warning, and no NaN but where it is documented, whatever the trace looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from small_traces import random_trace, traces

from moectl.traces.balance import balance
from moectl.traces.change import difference, fluctuation, saturation
from moectl.traces.coactivation import coactivation
from moectl.traces.domains import separation, specialisation
from moectl.traces.flow import flow, paths
from moectl.traces.hot import coverage, needed, slots
from moectl.traces.locality import context_independence, repetition
from moectl.traces.scores import pooled_aux, score_metrics
from moectl.traces.statistics import statistics_of
from moectl.traces.trace import RoutingTrace
from moectl.traces.vocabulary import vocabulary

METRICS: dict[str, Callable[[RoutingTrace], object]] = {
    "balance": lambda found: balance(statistics_of(found)),
    "balance of domains": lambda found: [balance(statistics_of(found), name) for name in found.tokens.domains],
    "scores": lambda found: score_metrics(statistics_of(found)),
    "pooled": lambda found: pooled_aux(statistics_of(found)),
    "specialisation": lambda found: specialisation(statistics_of(found), resamples=20),
    "separation": separation,
    "vocabulary": lambda found: [vocabulary(found, target, 2) for target in ("input", "next", "predicted")],
    "coactivation": coactivation,
    "adjacent": lambda found: coactivation(found, adjacent=True),
    "repetition": repetition,
    "context": context_independence,
    "flow": flow,
    "paths": paths,
    "saturation": lambda found: saturation(found, found),
    "fluctuation": lambda found: fluctuation([found, found, found]),
    "difference": lambda found: difference(found, found),
    "coverage": lambda found: coverage(statistics_of(found)),
    "slots": slots,
    "needed": needed,
}


def numbers(value: object, name: str) -> list[tuple[str, float]]:
    """Every number in a result, with the name of its field."""
    if isinstance(value, np.ndarray):
        return [(name, float(number)) for number in value.ravel()]
    if isinstance(value, Mapping):
        return [found for part in value.values() for found in numbers(part, name)]
    if is_dataclass(value):
        return [
            found for field in fields(value) for found in numbers(getattr(value, field.name), f"{name}.{field.name}")
        ]
    if isinstance(value, list | tuple):
        return [found for part in value for found in numbers(part, name)]
    if isinstance(value, float | int):
        return [(name, float(value))]
    assert value is None or isinstance(value, str), type(value)
    return []


@given(traces())
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("error")
def test_any_trace_gives_numbers(traced: RoutingTrace) -> None:
    check(traced)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lengths", [[0], [0, 0], [1], [1, 0], [2, 2, 2, 2]])
@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_no_tokens_one_token_and_no_choices_give_numbers(lengths: list[int], dropped: float) -> None:
    for experts, top_k in ((1, 1), (4, 1), (4, 4), (5, 2)):
        check(random_trace(0, lengths, experts, top_k, domains=3, dropped=dropped))


def check(traced: RoutingTrace) -> None:
    """No metric warns or returns a NaN that is not documented."""
    with np.errstate(all="raise", under="ignore"):
        for name, metric in METRICS.items():
            for field, number in numbers(metric(traced), name):
                assert math.isfinite(number) or (field.endswith(".together_EE") and math.isnan(number)), field


def test_results_repeat() -> None:
    """The same seed draws the same: what is shuffled or drawn again does not change from run to run."""
    traced = random_trace(3, [7, 6, 5, 7, 3, 6], 5, 2, domains=2)
    for name, metric in METRICS.items():
        one, other = numbers(metric(traced), name), numbers(metric(traced), name)
        assert one == other or any(math.isnan(number) for _, number in one), name
