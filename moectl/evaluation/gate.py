"""Which models a condition such as `code.difference>0.05` is true of: what makes `moectl eval` fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moectl.errors import UsageError
from moectl.evaluation.domains import MEAN, MEASURES, Measured
from moectl.report.conditions import Condition, parse_condition
from moectl.text import shown


def parse(text: str) -> Condition:
    """`[DOMAIN.]MEASURE>NUMBER`; without a domain, the mean over them.

    Raises:
        UsageError: it is not of that form.
    """
    return parse_condition(text, MEASURES, "DOMAIN", "'loss>2.0' or 'code.difference>0.05'")


def failures(condition: Condition, names: Sequence[str], results: Sequence[Mapping[str, Measured]]) -> list[str]:
    """A line for each model that it is true of.

    Raises:
        UsageError: there is no such domain.
    """
    domain = condition.place or MEAN
    lines = []
    for name, of_model in zip(names, results, strict=True):
        if domain not in of_model:
            raise UsageError(
                f"--fail-on names the domain {shown(domain)!r}.",
                "",
                f"Give one of {', '.join(map(shown, of_model))}.",
            )
        value = getattr(of_model[domain], condition.measure)
        if condition.true_of(value):
            lines.append(condition.told(name, domain, value))
    return lines
