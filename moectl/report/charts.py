"""The charts that reports share, as SVG text: horizontal bars in groups, and a roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.report.svg import (
    FAINT,
    GRID,
    INK,
    Scale,
    colour,
    element,
    figure,
    hint,
    line,
    log_scale,
    mark,
    number,
    text,
)

WIDTH = 900


@dataclass(frozen=True)
class Bar:
    """One bar: its series, its length, what is written behind it, and the ends of its whisker if it has one."""

    series: str
    value: float
    note: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One point of a roofline: FLOP per byte, FLOP/s, its series, what its column is called if it has one, a label."""

    series: str
    intensity: float
    speed: float
    column: str
    label: str


def bars(
    title: str,
    description: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    series: Sequence[str],
    axis: str,
    full: float | None = None,
) -> str:
    """Groups of horizontal bars on one axis from 0; `full` draws a line at what cannot be beaten."""
    left, right, row, gap, top = 190, 205, 20, 16, 16
    count = sum(len(group) for _, group in groups)
    bottom = top + count * row + len(groups) * gap
    longest = max([bar.high or bar.value for _, group in groups for bar in group] + [full or 0])
    scale = Scale(0, longest, left, WIDTH - right)
    body = []
    for tick in scale.ticks():
        body += [
            line(scale(tick), top, scale(tick), bottom),
            text(scale(tick), bottom + 18, number(tick), anchor="middle", fill=FAINT),
        ]
    if full is not None:
        body.append(line(scale(full), top, scale(full), bottom, INK, stroke_dasharray="4 3"))
    y = float(top)
    for label, group in groups:
        y += gap / 2
        body.append(text(8, y + 14, label, font_weight=600))
        for bar in group:
            place = series.index(bar.series)
            middle = y + row / 2
            body.append(text(left - 10, middle + 4, bar.series, anchor="end", size=11.5))
            width = max(1.0, scale(bar.value) - left)
            shown = hint(f"{label}, {bar.series}: {bar.note}")
            body.append(
                element("rect", shown, x=left, y=y + 3.0, width=width, height=row - 6.0, rx=2, fill=colour(place))
            )
            if bar.low is not None and bar.high is not None:
                body.append(line(scale(bar.low), middle, scale(bar.high), middle, INK, stroke_width=1.2))
            beyond = max(scale(bar.value), scale(bar.high or 0.0), float(left))
            body.append(
                text(
                    beyond + 8,
                    middle + 4,
                    bar.note,
                    size=11.5,
                    fill=FAINT,
                    stroke="#ffffff",
                    stroke_width=5,
                    paint_order="stroke",
                )
            )
            y += row
        y += gap / 2
        body.append(line(8, y, WIDTH - 8, y, GRID))
    body += [line(left, top, left, bottom, INK), text((left + WIDTH - right) / 2, bottom + 38, axis, anchor="middle")]
    return figure(WIDTH, bottom + 50, title, description, *body)


def roofline(
    title: str, description: str, points: Sequence[Point], series: Sequence[str], flops: float, bandwidth: float
) -> str:
    """Points under the roof of a device that does `flops` FLOP/s and moves `bandwidth` bytes/s, on logarithmic axes."""
    left, right, top, bottom = 78, 200, 24, 372
    size, unit = (1e12, "TFLOP/s") if flops >= 1e12 else (1e9, "GFLOP/s")
    ridge = flops / bandwidth
    x = log_scale([point.intensity for point in points] + [ridge], left, WIDTH - right)
    y = log_scale([point.speed / size for point in points] + [flops / size], bottom, top)

    def roof(intensity: float) -> float:
        return y(min(flops, intensity * bandwidth) / size)

    body = []
    for tick in x.ticks():
        body.append(line(x(tick), top, x(tick), bottom))
        body.append(text(x(tick), bottom + 18, number(tick), anchor="middle", fill=FAINT))
    for tick in y.ticks():
        body.append(line(left, y(tick), WIDTH - right, y(tick)))
        body.append(text(left - 8, y(tick) + 4, number(tick), anchor="end", fill=FAINT))
    start = max(x.low, y.low * size / bandwidth)
    path = f"M{x(start):.1f} {roof(start):.1f}L{x(ridge):.1f} {roof(ridge):.1f}H{WIDTH - right}"
    body.append(element("path", d=path, fill="none", stroke=INK, stroke_width=2))
    body.append(text(WIDTH - right - 6, roof(ridge) - 7, f"{flops / size:.3g} {unit}", anchor="end", size=11.5))
    along = (x(start) + x(ridge)) / 2, (roof(start) + roof(ridge)) / 2
    angle = math.degrees(math.atan2(roof(ridge) - roof(start), x(ridge) - x(start)))
    turned = f"rotate({angle:.1f} {along[0]:.1f} {along[1]:.1f})"
    body.append(
        text(along[0], along[1] - 7, f"{bandwidth / 1e9:.3g} GB/s", size=11.5, anchor="middle", transform=turned)
    )
    for column, place in {point.column: point.intensity for point in points if point.column}.items():
        body.append(line(x(place), roof(place), x(place), bottom, FAINT, stroke_dasharray="1 4"))
        right_of_it = x(place) < WIDTH - right - 60
        side, anchor = (5, "start") if right_of_it else (-5, "end")
        body.append(text(x(place) + side, bottom - 7, column, size=11, anchor=anchor, fill=FAINT))
    for place, name in enumerate(series):
        own = sorted((point for point in points if point.series == name), key=lambda point: point.intensity)
        if len(own) > 1:
            trail = "M" + "L".join(f"{x(point.intensity):.1f} {y(point.speed / size):.1f}" for point in own)
            body.append(element("path", d=trail, fill="none", stroke=colour(place), stroke_width=1.2, opacity=0.6))
        body += [mark(place, x(point.intensity), y(point.speed / size), colour(place), point.label) for point in own]
        height = top + 14.0 + 22 * place
        body.append(mark(place, WIDTH - right + 24, height, colour(place)))
        body.append(text(WIDTH - right + 38, height + 4, name))
    middle, centre = (left + WIDTH - right) / 2, (top + bottom) / 2
    body += [line(left, bottom, WIDTH - right, bottom, INK), line(left, top, left, bottom, INK)]
    body.append(text(middle, bottom + 40, "FLOP per byte that has to be moved", anchor="middle"))
    body.append(text(20, centre, unit, anchor="middle", transform=f"rotate(-90 20 {centre:g})"))
    return figure(WIDTH, bottom + 54, title, description, *body)
