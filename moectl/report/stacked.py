"""One bar cut into parts, as SVG text: what a whole is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moectl.report.svg import FAINT, colour, element, figure, hint, text

WIDTH = 900


@dataclass(frozen=True, slots=True)
class Part:
    """A part: what it is, how large, and what is written for its size."""

    name: str
    value: float
    note: str


def stacked(title: str, description: str, bars: Sequence[tuple[str, Sequence[Part]]]) -> str:
    """Bars under each other, on one scale from 0; a part has its colour by its name, in the order names appear."""
    left, right, height, gap, top = 90, 24, 34, 12, 10
    names = list(dict.fromkeys(part.name for _, parts in bars for part in parts))
    longest = max((sum(part.value for part in parts) for _, parts in bars), default=0) or 1.0
    body, y = [], float(top)
    for label, parts in bars:
        body.append(text(left - 10, y + height / 2 + 4, label, anchor="end", font_weight=600))
        x = float(left)
        for part in parts:
            width = part.value / longest * (WIDTH - left - right)
            shown = hint(f"{label}, {part.name}: {part.note}")
            fill = colour(names.index(part.name))
            body.append(element("rect", shown, x=x, y=y, width=max(width - 1, 0.5), height=height, fill=fill))
            x += width
        y += height + gap
    every = {part.name: part.note for _, parts in bars for part in parts}
    for number, name in enumerate(names):
        body.append(element("rect", x=left, y=y + 4, width=12, height=12, fill=colour(number)))
        body.append(text(left + 19, y + 14, name))
        body.append(text(WIDTH - right, y + 14, every[name], anchor="end", fill=FAINT))
        y += 21
    return figure(WIDTH, y + 8, title, description, *body)
