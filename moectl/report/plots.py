"""Lines over layers and columns over experts, as SVG text: axes from 0, chance dashed, bands where there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.report.svg import FAINT, INK, Scale, colour, element, figure, hint, line, mark, number, text

WIDTH = 900
LABEL = 14
"""Characters of a series' name beside its columns."""


@dataclass(frozen=True)
class Line:
    """One value per place, None where there is none; a chance level is dashed and has no marks."""

    series: str
    values: Sequence[float | None]
    chance: bool = False


@dataclass(frozen=True)
class Strip:
    """Columns of one series, with the ends of their intervals if they have them; `chance` is drawn dashed."""

    series: str
    values: Sequence[float]
    chance: float
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def lines(title: str, description: str, places: Sequence[str], series: Sequence[Line], axes: tuple[str, str]) -> str:
    """Series over named places; `axes` says what the places are and what is measured."""
    left, right, top, bottom = 70, 190, 26, 250
    known = [value for each in series for value in each.values if value is not None]
    y = Scale(0, max([*known, 1e-9]) * 1.06, bottom, top)
    step = (WIDTH - left - right) / max(len(places) - 1, 1)
    body = []
    for tick in y.ticks(5):
        body.append(line(left, y(tick), WIDTH - right, y(tick)))
        body.append(text(left - 8, y(tick) + 4, number(tick), anchor="end", fill=FAINT))
    every = max(1, math.ceil(8 * max(map(len, places), default=1) / max(step, 1)))
    for place in range(0, len(places), every):
        body.append(text(left + place * step, bottom + 18, places[place], anchor="middle", fill=FAINT))
    heights: list[float] = []
    drawn = 0
    for each in series:
        points = [(left + i * step, y(value)) for i, value in enumerate(each.values) if value is not None]
        if not points:
            continue
        ink = FAINT if each.chance else colour(drawn)
        path = "M" + "L".join(f"{x:.1f} {height:.1f}" for x, height in points)
        body.append(
            element(
                "path",
                d=path,
                fill="none",
                stroke=ink,
                stroke_width=1.6,
                stroke_dasharray="5 4" if each.chance else None,
            )
        )
        height = points[-1][1]
        while any(abs(height - other) < 15 for other in heights):
            height += 3
        heights.append(height)
        body.append(text(WIDTH - right + 12, height + 4, each.series, size=11.5, fill=ink))
        if not each.chance:
            shown = zip(points, (value for value in each.values if value is not None), strict=True)
            body += [mark(drawn, x, at, ink, f"{each.series}: {value:.4g}", 3.4) for (x, at), value in shown]
            drawn += 1
    body.append(line(left, bottom, WIDTH - right, bottom, INK))
    body.append(text((left + WIDTH - right) / 2, bottom + 38, axes[0], anchor="middle"))
    body.append(text(8, 14, axes[1]))
    return figure(WIDTH, max([bottom + 48.0, *(height + 12 for height in heights)]), title, description, *body)


def columns(title: str, description: str, strips: Sequence[Strip], places: Sequence[str], axes: tuple[str, str]) -> str:
    """One strip of columns under the other, on the same scale; series keep their colour from figure to figure."""
    left, right, top, each_height, gap = 140, 24, 26, 86, 22
    highest = max([value for strip in strips for value in (strip.high or strip.values)] + [s.chance for s in strips])
    step = (WIDTH - left - right) / max(len(places), 1)
    width = min(step * 0.72, 34)
    body = [text(8, 14, axes[1])]
    base = float(top)
    for place, strip in enumerate(strips):
        base += each_height
        y = Scale(0, max(highest, 1e-9), base, base - each_height + 8)
        for tick in y.ticks(2):
            body.append(line(left, y(tick), WIDTH - right, y(tick)))
            body.append(text(left - 8, y(tick) + 4, number(tick), anchor="end", size=11, fill=FAINT))
        name = strip.series if len(strip.series) <= LABEL else f"{strip.series[: LABEL - 1]}…"
        body.append(text(8, base - each_height / 2 + 8, name, font_weight=600, fill=colour(place)))
        for i, value in enumerate(strip.values):
            middle = left + (i + 0.5) * step
            shown = hint(f"{strip.series}, {places[i]}: {value:.4g}, chance {strip.chance:.4g}")
            body.append(
                element(
                    "rect",
                    shown,
                    x=middle - width / 2,
                    y=y(value),
                    width=width,
                    height=base - y(value),
                    fill=colour(place),
                )
            )
            if strip.low is not None and strip.high is not None:
                body.append(line(middle, y(strip.low[i]), middle, y(strip.high[i]), INK, stroke_width=1.2))
        body.append(line(left, y(strip.chance), WIDTH - right, y(strip.chance), INK, stroke_dasharray="5 4"))
        body.append(line(left, base, WIDTH - right, base, INK))
        base += gap
    every = max(1, math.ceil(8 * max(map(len, places), default=1) / max(step, 1)))
    for i in range(0, len(places), every):
        body.append(text(left + (i + 0.5) * step, base - gap + 15, places[i], anchor="middle", size=11, fill=FAINT))
    body.append(text((left + WIDTH - right) / 2, base + 12, axes[0], anchor="middle"))
    return figure(WIDTH, base + 22, title, description, *body)
