"""Lines over numbers, as SVG text: measured from 0, chance dashed, bounds thin, a gap where there is no value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from moectl.report.svg import FAINT, INK, Scale, colour, element, figure, hint, line, mark, number, text

WIDTH = 900
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 26, 268
MARKS = 12
"""Signs on a line, at most: in between it is told apart by its colour."""
DASHES = ("5 4", "2 3")
LABEL = 28
"""Characters of a series' name in the legend."""


@dataclass(frozen=True, slots=True)
class Trail:
    """A line: its name, a value for every x, None where there is none; the number of its colour and sign, or of its
    dashes where it is chance; what it is.
    """

    series: str
    values: Sequence[float | None]
    number: int = 0
    kind: Literal["line", "chance", "bound"] = "line"


def across(x: Sequence[float]) -> Scale:
    """Where rising x lie: on a logarithmic axis where their middle is nearer to the geometric mean of the ends."""
    low, high = x[0], x[-1]
    if low == high:
        return Scale(low - 1, high + 1, LEFT, WIDTH - RIGHT)
    middle, even = median(x), (low + high) / 2
    log = low > 0 and abs(middle - (low * high) ** 0.5) < abs(middle - even)
    return Scale(low, high, LEFT, WIDTH - RIGHT, log)


def curves(
    title: str,
    description: str,
    x: Sequence[float],
    trails: Sequence[Trail],
    axes: tuple[str, str],
    *,
    percent: bool = False,
) -> str:
    """Trails over x, which rises; `axes` says what x is and what is measured: a share if `percent`.

    A hidden line of class `marker` stands at x = 0 of the drawing, for scripts to move.
    """
    x_scale = across(x)
    known = [value for trail in trails for value in trail.values if value is not None]
    highest = max([0.0, *known]) or 1.0  # of nothing but zeros, an axis that shows how little they are
    y = Scale(min([0.0, *known]), highest * 1.06, BOTTOM, TOP)
    body = []
    for tick in y.ticks(6):
        label = f"{100 * tick:.3g}%" if percent else number(tick)
        body.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        body.append(text(LEFT - 8, y(tick) + 4, label, anchor="end", fill=FAINT))
    beyond = float("-inf")
    for tick in _ticks(x, x_scale):
        if x_scale(tick) - beyond >= 44:
            beyond = x_scale(tick)
            body.append(line(beyond, BOTTOM, beyond, BOTTOM + 4, INK))
            body.append(text(beyond, BOTTOM + 18, spelled(tick), anchor="middle", fill=FAINT))
    order = ("chance", "bound", "line")
    for trail in sorted(trails, key=lambda each: order.index(each.kind)):
        body += _drawn(trail, [x_scale(place) for place in x], x, y, axes[0], percent)
    body += [line(LEFT, BOTTOM, WIDTH - RIGHT, BOTTOM, INK)]
    body.append(text((LEFT + WIDTH - RIGHT) / 2, BOTTOM + 38, axes[0], anchor="middle"))
    body.append(text(8, 14, axes[1]))
    body.append(line(0, TOP, 0, BOTTOM, INK, class_="marker", visibility="hidden"))
    below = TOP + 8.0
    for trail in sorted(trails, key=_height, reverse=True):
        body.append(_entry(trail, WIDTH - RIGHT + 16, below))
        below += 19
    return figure(WIDTH, max(BOTTOM + 48.0, below), title, description, *body)


def spelled(value: float) -> str:
    """A place on the axis: as it is, large ones shortened."""
    return f"{value:,.6g}" if abs(value) < 1e5 else number(value)


def _ticks(x: Sequence[float], scale: Scale) -> Sequence[float]:
    """The x themselves where they are few or multiply, else round numbers; whole ones where x are whole."""
    if scale.log or len(x) <= 10:
        return x
    whole = all(float(place).is_integer() for place in x)
    return [tick for tick in scale.ticks(8) if not whole or float(tick).is_integer()]


def _style(trail: Trail) -> dict[str, object]:
    if trail.kind == "chance":
        return {"stroke": FAINT, "stroke_width": 1.6, "stroke_dasharray": DASHES[trail.number % len(DASHES)]}
    if trail.kind == "bound":
        return {"stroke": INK, "stroke_width": 0.9}
    return {"stroke": colour(trail.number), "stroke_width": 1.8}


def _sign(trail: Trail, x: float, y: float, label: str = "") -> str:
    # Eight colours go round; a sign more each time keeps the ninth series apart from the first.
    return mark(trail.number + trail.number // 8, x, y, colour(trail.number), label, 3.4)


def _height(trail: Trail) -> float:
    known = [value for value in trail.values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _drawn(trail: Trail, places: Sequence[float], x: Sequence[float], y: Scale, axis: str, percent: bool) -> list[str]:
    """Its runs without a gap, with signs on some of the points; a point between gaps always has one."""
    style, body = _style(trail), []
    runs: list[list[int]] = [[]]
    for at, value in enumerate(trail.values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(at)
    every = -(-len(x) // MARKS)
    for run in filter(None, runs):
        points = {at: (places[at], y(trail.values[at] or 0.0)) for at in run}
        if len(run) > 1:
            path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in points.values())
            body.append(element("path", d=path, fill="none", **style))
        for at, (left, top) in points.items():
            value = trail.values[at] or 0.0
            told = f"{trail.series}, {axis} {spelled(x[at])}: {f'{100 * value:.3g}%' if percent else number(value)}"
            if trail.kind == "line" and (at % every == 0 or len(run) == 1):
                body.append(_sign(trail, left, top, told))
            elif len(run) == 1:
                body.append(element("circle", hint(told), cx=left, cy=top, r=2.4, fill=style["stroke"]))
    return body


def _entry(trail: Trail, left: float, middle: float) -> str:
    """A line of the legend."""
    name = trail.series if len(trail.series) <= LABEL else f"{trail.series[: LABEL - 1]}…"
    sample = [element("path", d=f"M{left:.1f} {middle:.1f}h22", fill="none", **_style(trail))]
    if trail.kind == "line":
        sample.append(_sign(trail, left + 11, middle))
    return element("g", hint(trail.series), *sample, text(left + 29, middle + 4, name, size=11.5))
