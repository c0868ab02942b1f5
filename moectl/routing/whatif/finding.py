"""What a what-if says: a sentence, a table, curves for the page, and what all of it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moectl.report.output import Cell


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines over the same x, from exact computation at each of them: what a slider moves along.

    Attributes:
        title: what is to be seen, in words.
        x_label, y_label: axes with units.
        x: rising.
        lines: name -> y at every x; None where there is no value. Shares are from 0 to 1.
        chance: which of the lines is what chance gives, if any.
        bound: which of the lines cannot be beaten, if any.
        percent: whether y is a share.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    chance: str | None = None
    bound: str | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question about one trace.

    Attributes:
        name: of the what-if, as `cache`.
        headline: the answer in a sentence, with its numbers and what chance gives.
        columns, rows: a table; a row per layer, policy or setting.
        curves: for the page.
        assumptions: what the numbers rest on, a sentence each.
        detail: more, as plain data, for JSON and for those that build on it.
    """

    name: str
    headline: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    curves: tuple[Curve, ...] = ()
    assumptions: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
