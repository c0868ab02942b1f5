"""What differs between two models, and what a model loses without some of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moectl.report.html import Figure, Heading, Paragraph, Part, Table
from moectl.report.output import Cell
from moectl.report.plots import Line, lines
from moectl.routing.analysis import Analysis
from moectl.routing.masks import Held
from moectl.routing.rerun import Losses
from moectl.routing.words import percent
from moectl.traces.change import Differences

COMPARED = ("max_vio", "effective", "entropy", "busiest", "busiest_share", "repeat")
"""Of MEASURES, what two models are shown side by side in."""


def comparison(one: Analysis, other: Analysis, differences: Mapping[str, Differences]) -> Iterator[Part]:
    """What differs between two models or traces that read the same tokens."""
    theirs = {stream.name: stream for stream in other.streams}
    for stream in one.streams:
        if stream.name not in differences:
            continue
        found = differences[stream.name]
        most = max(found.layers, key=lambda each: each.ids)
        places = [each.point.label for each in found.layers]
        head = (
            f"{percent(found.tokens)} of the tokens take another way somewhere; most change in layer {most.point.label}"
        )
        series = [
            Line("experts changed", [each.ids for each in found.layers]),
            Line("first choice changed", [each.first for each in found.layers]),
            Line("by chance, experts", [1 - each.point.top_k / each.point.num_experts for each in found.layers], True),
        ]
        if all(each.weights is not None for each in found.layers):
            series.insert(2, Line("weight moved", [each.weights for each in found.layers]))
        told = (
            f"From {one.name} to {other.name}: {percent(most.ids)} of the experts of layer {most.point.label} differ."
        )
        svg = lines(head, told, places, series, ("layer", "share"))
        caption = (
            f"{one.name} against {other.name}, token by token. Experts: of a token's experts, those it has not in the "
            "other; weight: how much of the mixture moved; by chance: for independent even choices."
        )
        yield Heading(f"Compared with {other.name}")
        yield Figure(head, svg, caption, f"{stream.name}-difference")
        rows = [
            [mine["layer"], *(cell for name in COMPARED for cell in (mine.get(name), their.get(name)))]
            for mine, their in zip(stream.rows, theirs[stream.name].rows, strict=True)
        ]
        yield Table(
            ["layer", *(f"{name.replace('_', ' ')}{end}" for name in COMPARED for end in ("", ", other"))],
            shortened(rows),
        )


def masked(losses: Losses, estimates: Sequence[Held]) -> Iterator[Part]:
    """The loss under every mask, and what the trace alone would let one guess."""
    yield Heading("Without some experts")
    rows: list[list[Cell]] = [["none", losses.loss, None, None, None]]
    rows += [[rerun.mask.label, rerun.loss, rerun.change, *rerun.change_interval] for rerun in losses.masks]
    yield Paragraph(f"Nats per token of {losses.tokens:,} tokens; the change with its 95% interval, over documents.")
    yield Table(["mask", "loss", "change", "low", "high"], shortened(rows))
    if estimates:
        least = min(estimates, key=lambda each: each.share_K[0])
        words = f"In the trace the first expert holds {percent(float(least.share_K[0]))} of the weight or more"
        yield Paragraph(f"{words} (least in layer {least.label}): an estimate only, the loss above is what it does.")


def shortened(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Rows with numbers of four digits."""
    return [[float(f"{cell:.4g}") if isinstance(cell, float) else cell for cell in row] for row in rows]
