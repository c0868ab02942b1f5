"""Conditions such as `loss>2.0` or `code.difference>0.05` that make `moectl eval` fail."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moectl.errors import UsageError
from moectl.evaluation.domains import MEAN, MEASURES, Measured
from moectl.text import shown

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_CONDITION = re.compile(r"(?:(?P<domain>.+)\.)?(?P<measure>\w+)\s*(?P<operator>[<>]=?)\s*(?P<limit>[-+.\deE]+)")


@dataclass(frozen=True, slots=True)
class Condition:
    """A measure of a domain compared with a number; what it says is a failure."""

    domain: str
    measure: str
    operator: str
    limit: float

    def failures(self, names: Sequence[str], results: Sequence[Mapping[str, Measured]]) -> list[str]:
        """A line for each model that it is true of.

        Raises:
            UsageError: there is no such domain.
        """
        lines = []
        for name, of_model in zip(names, results, strict=True):
            if self.domain not in of_model:
                raise UsageError(
                    f"--fail-on names the domain {shown(self.domain)!r}.",
                    "",
                    f"Give one of {', '.join(map(shown, of_model))}.",
                )
            value = getattr(of_model[self.domain], self.measure)
            if _OPERATORS[self.operator](value, self.limit):
                measure = f"{self.domain}.{self.measure}"
                lines.append(f"{name}: {measure} is {value:.6g}, {self.operator} {self.limit:g}")
        return lines


def parse_condition(text: str) -> Condition:
    """`[DOMAIN.]MEASURE>NUMBER`, with >, >=, < or <=; without a domain, the mean over them.

    Raises:
        UsageError: it is not of that form.
    """
    match = _CONDITION.fullmatch(text.strip())
    try:
        if match is None or match["measure"] not in MEASURES:
            raise ValueError
        return Condition(match["domain"] or MEAN, match["measure"], match["operator"], float(match["limit"]))
    except ValueError:
        raise UsageError(
            f"--fail-on {shown(text)!r} is no condition.",
            f"A condition is [DOMAIN.]MEASURE>NUMBER with a measure of {', '.join(MEASURES)}.",
            "Give one such as 'loss>2.0' or 'code.difference>0.05'.",
        ) from None
