"""Conditions such as `loss>2.0` or `code.difference>0.05`, for gates in pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from moectl.errors import UsageError
from moectl.text import shown

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_CONDITION = re.compile(r"(?:(?P<place>.+)\.)?(?P<measure>\w+)\s*(?P<operator>[<>]=?)\s*(?P<limit>[-+.\deE]+)")


@dataclass(frozen=True, slots=True)
class Condition:
    """A measure, of one place or of any, compared with a number; what it says is a failure."""

    place: str | None
    measure: str
    operator: str
    limit: float

    def true_of(self, value: float) -> bool:
        """Whether the measure has such a value."""
        return _OPERATORS[self.operator](value, self.limit)

    def told(self, name: str, place: str, value: float) -> str:
        """The failure in words."""
        return f"{name}: {place}.{self.measure} is {value:.6g}, {self.operator} {self.limit:g}"


def parse_condition(text: str, measures: Collection[str], place: str, example: str) -> Condition:
    """`[PLACE.]MEASURE>NUMBER`, with >, >=, < or <=; `place` and `example` are for the message.

    Raises:
        UsageError: it is not of that form.
    """
    match = _CONDITION.fullmatch(text.strip())
    try:
        if match is None or match["measure"] not in measures:
            raise ValueError
        return Condition(match["place"], match["measure"], match["operator"], float(match["limit"]))
    except ValueError:
        raise UsageError(
            f"--fail-on {shown(text)!r} is no condition.",
            f"A condition is [{place}.]MEASURE>NUMBER with a measure of {', '.join(measures)}.",
            f"Give one such as {example}.",
        ) from None
