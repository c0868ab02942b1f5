"""Small helpers to draw charts as SVG by hand: elements, scales, colours and marks that everybody can tell apart.

Only plain attributes are used, no style sheet and no variables, so that a saved figure looks the same in every program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c00", "#555555")
"""Okabe and Ito's colours, told apart with every kind of colour blindness; yellow, too pale on white, is left out."""

INK, FAINT, GRID = "#1c1c1c", "#5f6368", "#dfe1e5"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element; `stroke_width=2` becomes stroke-width="2", None leaves one out, numbers are cut to 1/100."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{tag}{written}>{inside}</{tag}>" if inside else f"<{tag}{written}/>"


def text(x: float, y: float, content: str, *, size: float = 12, anchor: str = "start", **more: object) -> str:
    """A line of text."""
    attributes = {"fill": INK, "font_size": size, "text_anchor": anchor, **more}
    return element("text", escape(content), x=x, y=y, **attributes)


def hint(words: str) -> str:
    """What shows on hovering over the element that this is put into."""
    return element("title", escape(words))


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, **more: object) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **{"stroke": colour, "stroke_width": 1, **more})


def mark(number: int, x: float, y: float, colour: str, label: str = "", radius: float = 5) -> str:
    """The sign of series `number`: circle, square, triangle, diamond, then hollow; `label` shows on hovering."""
    r = radius
    diamond = " ".join(f"{x + dx * r:.2f},{y + dy * r:.2f}" for dx, dy in ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)))
    triangle = " ".join(f"{x + dx * r:.2f},{y + dy * r:.2f}" for dx, dy in ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)))
    shapes = (
        element("circle", cx=x, cy=y, r=r),
        element("rect", x=x - r * 0.9, y=y - r * 0.9, width=1.8 * r, height=1.8 * r),
        element("polygon", points=triangle),
        element("polygon", points=diamond),
    )
    hollow = number // len(shapes) % 2 == 1
    inside = shapes[number % len(shapes)] + (hint(label) if label else "")
    return element("g", inside, fill="#ffffff" if hollow else colour, stroke=colour, stroke_width=1.6)


def colour(number: int) -> str:
    """The colour of series `number`; with `mark`, eight colours go round while the signs change."""
    return PALETTE[number % len(PALETTE)]


@dataclass(frozen=True)
class Scale:
    """From values low..high to pixels start..end, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values within the scale: 1, 2 or 5 times a power of ten; all powers of ten when logarithmic."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / count))
            powers = [10.0**power for power in range(first, last + 1, every)]
            if len(powers) > 2:
                return powers
            finer = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
            return [value for value in finer if self.low <= value <= self.high]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale with a little room around positive values."""
    low, high = min(values) / 1.6, max(values) * 1.6
    return Scale(low, high, start, end, log=True)


def figure(width: float, height: float, title: str, description: str, *body: str) -> str:
    """A whole SVG that a screen reader can read: `title` names it, `description` says what it shows."""
    return element(
        "svg",
        hint(title),
        element("desc", escape(description)),
        element("rect", width=width, height=height, fill="#ffffff"),
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
        font_family=FONT,
    )


def number(value: float) -> str:
    """A value for a label: three significant digits, thousands and millions as k and M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
