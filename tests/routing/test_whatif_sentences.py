"""Every number in a finding's sentence stands in its table, or is one of its options."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import product

import pytest
from ragged import LENGTHS, SHAPES, ragged
from synthetic import trace as drawn

from moectl.errors import InputError, UsageError
from moectl.routing.whatif import pruning
from moectl.routing.whatif.finding import Finding
from moectl.routing.whatif.registry import WHAT_IFS

NUMBER = re.compile(r"(?<![\w.])([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(%?)(?! tokens on)")
TRACES = [ragged(number, *each) for number, each in enumerate(product(SHAPES, LENGTHS))]
TRACES += [drawn(), drawn(by_domain=2.0, experts=64, top_k=8), drawn(experts=32, top_k=4, collapsed=(1,), sticky=3.0)]


def missing(found: Finding, known: list[float]) -> list[str]:
    """Numbers with a point or a percent sign that no cell is rounded to, be it a share, in thousands or its opposite.

    Whole numbers count batches, GPUs, slots and experts, which the settings and the trace have.
    """
    cells = [cell for row in found.rows for cell in row if isinstance(cell, int | float)]
    values = [scale * value for value in [*cells, *known] for scale in (1, 100, 1e-3)]
    absent = []
    for text, percent in NUMBER.findall(found.headline):
        digits = len(text.partition(".")[2]) if "e" not in text else 9
        near = 0.500001 * 10**-digits
        there = any(abs(value - float(text.replace(",", ""))) <= near for value in values)
        if ("." in text or percent) and not there:
            absent.append(text + percent)
    return absent


@pytest.mark.parametrize("name", [each.name for each in WHAT_IFS])
def test_sentences_say_what_tables_hold(name: str) -> None:
    module = next(each for each in WHAT_IFS if each.name == name).load()
    said = 0
    for traced in TRACES:
        options = module.Options(nodes=2, limit=1) if name == "node-limit" else module.Options()
        try:
            found = module.run(traced, options)
        except (InputError, UsageError):
            continue
        known = [getattr(options, field.name) for field in fields(options)]
        known = [each for each in known if isinstance(each, int | float)]
        known += {"capacity": [0.01], "offload": [found.detail.get("tokens_per_fetch", 0)]}.get(name, [])
        assert not missing(found, known), found.headline
        said += 1
    assert said >= 6


def test_pruning_says_how_many_are_removed_and_not_how_many_were_asked_for() -> None:
    """A quarter of 6, 3 and 8 experts is 2, 1 and 2 of them: 31%."""
    assert pruning.run(TRACES[3], pruning.Options()).headline.startswith("Without the least used 31% of the experts")


def test_a_number_that_is_elsewhere_is_seen() -> None:
    found = pruning.run(TRACES[0], pruning.Options())
    assert missing(replace(found, headline=found.headline + " It takes 12.3% more."), [0.25]) == ["12.3%"]
