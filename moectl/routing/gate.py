"""Which layers a condition such as `max_vio>2` is true of: what makes `moectl analyze-routing` fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moectl.errors import UsageError
from moectl.report.conditions import Condition, parse_condition
from moectl.report.output import Cell
from moectl.routing.analysis import DIFFERENCES, MEASURES
from moectl.text import shown

Rows = Sequence[Mapping[str, Cell]]
"""Of layers: each with its `layer` and its measures."""


def parse(text: str) -> Condition:
    """`[LAYER.]MEASURE>NUMBER`; without a layer, any of them.

    Raises:
        UsageError: it is not of that form.
    """
    return parse_condition(text, [*MEASURES, *DIFFERENCES], "LAYER", "'max_vio>2' or '3.effective<4'")


def failures(condition: Condition, results: Mapping[str, Rows]) -> list[str]:
    """A line for each layer, of each of the named results, that it is true of.

    Raises:
        UsageError: there is no such layer, or the measure is not known of any.
    """
    places = dict.fromkeys(str(row["layer"]) for rows in results.values() for row in rows)
    if condition.place is not None and condition.place not in places:
        raise UsageError(
            f"--fail-on names the layer {shown(condition.place)!r}.", "", f"Give one of {', '.join(places)}."
        )
    lines, known = [], False
    for name, rows in results.items():
        for row in rows:
            value, place = row.get(condition.measure), str(row["layer"])
            if isinstance(value, int | float) and condition.place in (None, place):
                known = True
                if condition.true_of(value):
                    lines.append(condition.told(name, place, value))
    if not known:
        raise UsageError(
            f"--fail-on names {condition.measure}, which is not known here.",
            "The recording cannot answer it, or nothing was compared.",
            "Give another measure, or another MODEL as well if it is about differences.",
        )
    return lines
