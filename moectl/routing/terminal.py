"""What a person sees at a terminal: a row per layer, a heat strip of the loads, the verdict and what stands out.

Nothing needs colour, and everything fits 80 columns; where the terminal cannot show block characters, ASCII ones stand
in for them. In a pipe the rows are all numbers. Legend: E experts, C columns of the strip.
"""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import TextIO

import numpy as np

from moectl.report.heat import SEQUENTIAL
from moectl.report.output import Cell
from moectl.routing.analysis import Analysis, Stream, difference_rows
from moectl.routing.judge import flags
from moectl.routing.report import Report
from moectl.routing.verdict import SIGNS
from moectl.routing.words import percent
from moectl.text import escape

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
SPARK = 12
MOST_COLUMNS = 128
COLUMNS = ["layer", "load", "max/mean", "in effect", "entropy", "repeat", "flags"]
TITLE = "Sorted load of the experts; first choices that repeat / by chance"


def table(analysis: Analysis, encoding: str = "utf-8") -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows for a terminal: the sorted load as a bar, the busiest expert's multiple of an even share, ..."""
    rows: list[list[Cell]] = []
    for stream in analysis.streams:
        for number, row in enumerate(stream.rows):
            load = stream.balance[number]
            rows.append(
                [
                    _named(analysis, stream, row["layer"]),
                    "|" + spark(np.sort(load.share_E)[::-1], SPARK, encoding) + "|",
                    f"{1 + load.max_vio:.2f}",
                    f"{load.effective:.1f}/{load.point.num_experts}",
                    f"{load.entropy:.3f}",
                    _against(row.get("repeat"), row.get("repeat_chance")),
                    ", ".join(flags(stream, number)),
                ]
            )
    return COLUMNS, rows


def full(found: Report) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows for a pipe: every number of `MEASURES`, and of `DIFFERENCES`, that is known of some layer."""
    differing = {stream: difference_rows(each) for stream, each in (found.differences or {}).items()}
    rows = [
        {"stream": stream.name, **row, **(differing[stream.name][number] if stream.name in differing else {})}
        | {"flags": ", ".join(flags(stream, number))}
        for stream in found.analysis.streams
        for number, row in enumerate(stream.rows)
    ]
    columns = [*dict.fromkeys(name for row in rows for name in row if name != "flags"), "flags"]
    return columns, [[row.get(name) for name in columns] for row in rows]


def spark(value_E: np.ndarray, width: int, encoding: str = "utf-8") -> str:
    """Values from 0 as bars of eight heights, the largest full; neighbours are averaged to fit `width`."""
    signs = glyphs(encoding)
    value_C = pooled(value_E, width)
    largest = max(float(value_C.max(initial=0.0)), 1e-300)
    heights = np.where(value_C > 0, np.clip(np.ceil(value_C / largest * 8), 1, 8), 0)
    return "".join(signs[int(height)] for height in heights)


def strip(analysis: Analysis, width: int = 80, *, by_number: bool = False, encoding: str = "utf-8") -> list[str]:
    """A line per layer, a sign per expert: its load in eighths of the largest in any layer of the stream.

    Experts stand by load, or by their numbers; neighbours are pooled where there are more than fit.
    """
    lines = []
    for stream in analysis.streams:
        named = [_named(analysis, stream, point.label) for point in stream.points]
        margin = max(map(len, named))
        level_RC = levels(stream, min(width - margin - 4, MOST_COLUMNS), by_number=by_number)
        signs = glyphs(encoding)
        for name, level_C in zip(named, level_RC, strict=True):
            lines.append(f"{name:>{margin}} |{''.join(signs[level] for level in level_C)}|")
    return lines


def print_strip(analysis: Analysis, to: TextIO, width: int = 80, *, by_number: bool = False) -> None:
    """The strip; on a terminal of 256 colours and more in half-blocks, two layers a line."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=to, width=width, highlight=False)
    order = "by number" if by_number else "by load"
    console.print(f"Load of the experts of each layer, {order}:", markup=False)
    if console.no_color or not console.is_terminal or console.color_system not in ("256", "truecolor"):
        for plain in strip(analysis, width, by_number=by_number, encoding=to.encoding):
            console.print(plain, markup=False)
        return
    for stream in analysis.streams:
        named = [_named(analysis, stream, point.label) for point in stream.points]
        margin = max(map(len, named))
        level_RC = levels(stream, min(width - margin - 4, MOST_COLUMNS), by_number=by_number)
        for row in range(0, len(level_RC), 2):
            lower_C = level_RC[row + 1] if row + 1 < len(level_RC) else []
            line = Text(f"{named[row]:>{margin}} ")
            for upper, lower in zip_longest(level_RC[row], lower_C):
                line.append("▀", f"{_shade(upper)} on {_shade(lower)}")
            console.print(line)


def levels(stream: Stream, width: int, *, by_number: bool) -> list[list[int]]:
    """From 0, no token, to 8, the largest load of the stream's layers."""
    shares = [each.share_E * each.point.num_experts for each in stream.balance]
    pooled_RC = [pooled(share_E if by_number else np.sort(share_E)[::-1], width) for share_E in shares]
    largest = max(float(share_C.max()) for share_C in pooled_RC) or 1.0
    return [
        np.where(share_C > 0, np.clip(np.ceil(share_C / largest * 8), 1, 8), 0).astype(int).tolist()
        for share_C in pooled_RC
    ]


def pooled(value_E: np.ndarray, width: int) -> np.ndarray:
    """Means of neighbours, as many of each as it takes to have at most `width`."""
    each = -(-len(value_E) // width)
    starts = np.arange(0, len(value_E), each)
    return np.asarray(np.add.reduceat(value_E, starts) / np.diff(np.append(starts, len(value_E))))


def words(found: Report, width: int = 80) -> list[str]:
    """The verdict, a headline and its numbers per card; what stands out; what differs; what masks cost."""
    lines = []
    for card in found.cards:
        lines += _wrapped(f"{SIGNS[card.level]} {card.topic}: {card.headline}.", width, "  ")
        lines += _wrapped(f"    {card.detail}", width, "    ")
    for number, each in enumerate(found.surprises, 1):
        lines += ["", "What stands out:"] if number == 1 else []
        lines += _wrapped(f"{number}. Layer {each.layer}: {each.text}. Look: {each.look}.", width, "   ")
    for stream, differences in (found.differences or {}).items():
        worst = max(differences.layers, key=lambda each: each.ids)
        other = found.other.name if found.other else ""
        told = f"Against {other}, {stream}: {percent(differences.tokens)} of the tokens take another way somewhere."
        told += f" Most in layer {worst.point.label}: {percent(worst.ids)} of a token's experts are others"
        lines += ["", *_wrapped(f"{told} ({percent(worst.ids_chance)} if independent).", width, "  ")]
    for stream, course in found.courses.items():
        lines += ["", *_wrapped(course.told(stream), width, "  ")]
    if found.weights:
        most = max(found.weights, key=lambda each: each.closest[2])
        one, two, cosine = most.closest
        told = f"Most alike by their weights: experts {one} and {two} of layer {most.layer}, cosine {cosine:.3f}"
        lines += ["", *_wrapped(f"{told} (unrelated: 0, give or take {most.experts.spread:.1g}).", width, "  ")]
    if found.losses is not None:
        told = f"Loss on this text: {found.losses.loss:.4f} nats per token."
        told += " What masks add to it (95%, over documents):"
        lines += ["", *_wrapped(told, width, "  ")]
        for rerun in found.losses.masks:
            low, high = rerun.change_interval
            told = f"  {rerun.mask.label}: {rerun.change:+.4f} ({low:+.4f} to {high:+.4f})"
            lines += _wrapped(told, width, "    ")
    return lines


def glyphs(encoding: str) -> str:
    """Nine signs from nothing to full that the encoding has."""
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BLOCKS


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(escape(text), width, subsequent_indent=indent, break_on_hyphens=False)


def _named(analysis: Analysis, stream: Stream, label: object) -> str:
    several = len(analysis.streams) > 1 and stream.name not in str(label)
    return f"{stream.name} {label}" if several else str(label)


def _shade(level: int | None) -> str:
    return "default" if level is None else "black" if level == 0 else SEQUENTIAL[level - 1]


def _against(share: Cell, null: Cell) -> str:
    known = isinstance(share, float) and isinstance(null, float)
    return f"{100 * share:.0f} / {100 * null:.0f}%" if known else ""  # type: ignore[operator]
