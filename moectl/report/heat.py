"""A heat map as SVG text: one path per shade, so that tens of thousands of cells stay small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from moectl.report.svg import FAINT, INK, element, figure, text

WIDTH = 900


@dataclass(frozen=True)
class Shade:
    """A colour and what it stands for."""

    colour: str
    meaning: str


DIVERGING = ("#8c4708", "#c76b12", "#f0a95a", "#fbdcb8", "#f5f5f2", "#c9d9ec", "#86abd6", "#3f74b5", "#123a73")
"""From orange (less) over a pale middle to blue (more): told apart with every kind of colour blindness."""

SEQUENTIAL = ("#f7f8fa", "#dce8f4", "#b8d2ea", "#8cb6dc", "#5b95c9", "#2f72b0", "#125091", "#0a2f62")


def heat(
    title: str,
    description: str,
    level_RC: Sequence[Sequence[int]],
    shades: Sequence[Shade],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    *,
    square: bool = False,
) -> str:
    """Cells of R rows and C columns, each the number of its shade; `axes` names the columns and the rows.

    The group of the cells carries where they lie (`data-left`, `-top`, `-width`, `-height`, of the drawing and of one
    cell), for scripts that want to know what is pointed at.
    """
    left, top, right = 76, 30, 24
    count = max(len(columns), 1)
    width = min((WIDTH - left - right) / count, 26.0 if square else 60.0)
    height = width if square else min(22.0, max(7.0, 520 / max(len(rows), 1)))
    bottom = top + height * len(rows)
    cells: dict[int, list[str]] = defaultdict(list)
    gap = 0.6 if min(width, height) > 4 else 0.0
    for row, levels in enumerate(level_RC):
        for column, level in enumerate(levels):
            x, y = left + column * width, top + row * height
            cells[level].append(f"M{x:.1f} {y:.1f}h{width - gap:.1f}v{height - gap:.1f}h-{width - gap:.1f}z")
    drawn = [element("path", d="".join(cells[level]), fill=shades[level].colour) for level in sorted(cells)]
    place = {"data_left": left, "data_top": top, "data_width": round(width, 4), "data_height": round(height, 4)}
    body = [element("g", *drawn, class_="cells", **place)]
    every = max(1, -(-14 // int(max(height, 1))))
    for row in range(0, len(rows), every):
        body.append(text(left - 8, top + (row + 0.5) * height + 4, rows[row], anchor="end", size=11))
    every = max(1, -(-int(9 * max(map(len, columns), default=1)) // int(max(width, 1))))
    for column in range(0, len(columns), every):
        body.append(text(left + (column + 0.5) * width, bottom + 14, columns[column], anchor="middle", size=11))
    body.append(text(left + width * count / 2, bottom + 32, axes[0], anchor="middle", fill=FAINT))
    body.append(text(left - 8, top - 12, axes[1], anchor="end", fill=FAINT))
    x = float(left)
    for shade in shades:
        body.append(element("rect", x=x, y=bottom + 44, width=14, height=14, fill=shade.colour, stroke=FAINT))
        body.append(text(x + 19, bottom + 55, shade.meaning, size=11, fill=INK))
        x += 36 + 6.2 * len(shade.meaning)
    return figure(WIDTH, bottom + 68, title, description, *body)
