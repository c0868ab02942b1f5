"""What flows from the things on the left to those on the right, as ribbons (a Sankey diagram), as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

from moectl.report.svg import FAINT, GRID, colour, element, figure, hint, text

WIDTH, HEIGHT = 900, 420
OTHERS = "others"
_LEFT, _RIGHT, _BAR, _TOP, _GAP = 130, 130, 14, 34, 4


def ribbons(
    title: str,
    description: str,
    left: Sequence[str],
    right: Sequence[str],
    flow_LR: Sequence[Sequence[float]],
    sides: tuple[str, str],
) -> str:
    """Ribbons as wide as `flow_LR`; bars as long as the sums of what leaves and arrives. `sides` names the two.

    What flows from or to `OTHERS` is grey.
    """
    outgoing = [sum(row) for row in flow_LR]
    incoming = [sum(row[j] for row in flow_LR) for j in range(len(right))]
    total = max(sum(outgoing), 1e-12)
    room = HEIGHT - _TOP - 16 - _GAP * (max(len(left), len(right)) - 1)
    scale = room / total
    start, end = _places(outgoing, scale), _places(incoming, scale)
    x_left, x_right = _LEFT + _BAR, WIDTH - _RIGHT - _BAR
    middle = (x_left + x_right) / 2
    used_left, used_right = list(start), list(end)
    body = []
    for i, row in enumerate(flow_LR):
        for j, amount in enumerate(row):
            if amount <= 0:
                continue
            width = amount * scale
            y, z = used_left[i], used_right[j]
            used_left[i] += width
            used_right[j] += width
            path = (
                f"M{x_left} {y:.1f}C{middle:g} {y:.1f} {middle:g} {z:.1f} {x_right} {z:.1f}v{width:.2f}"
                f"C{middle:g} {z + width:.1f} {middle:g} {y + width:.1f} {x_left} {y + width:.1f}z"
            )
            shown = hint(f"{left[i]} to {right[j]}: {amount:,.0f}")
            grey = OTHERS in (left[i], right[j])
            body.append(element("path", shown, d=path, fill=GRID if grey else colour(i), fill_opacity=0.6))
    for names, amounts, tops, x, anchor, at in (
        (left, outgoing, start, _LEFT, "end", _LEFT - 8),
        (right, incoming, end, x_right, "start", x_right + _BAR + 8),
    ):
        for name, amount, y in zip(names, amounts, tops, strict=True):
            height = max(amount * scale, 0.5)
            body.append(element("rect", x=x, y=y, width=_BAR, height=height, fill=FAINT))
            if height > 7:
                body.append(text(at, y + height / 2 + 4, name, size=11, anchor=anchor))
    body.append(text(_LEFT, 16, sides[0], fill=FAINT))
    body.append(text(WIDTH - _RIGHT, 16, sides[1], anchor="end", fill=FAINT))
    return figure(WIDTH, HEIGHT, title, description, *body)


def _places(amounts: Sequence[float], scale: float) -> list[float]:
    places, y = [], float(_TOP)
    for amount in amounts:
        places.append(y)
        y += amount * scale + _GAP
    return places
