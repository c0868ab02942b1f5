"""What differs between two models, what a model loses without some experts, and how alike their weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moectl.report.html import Figure, Heading, Paragraph, Part, Table
from moectl.report.output import Cell
from moectl.report.plots import Line, lines
from moectl.routing.analysis import Analysis
from moectl.routing.page.figures import load_maps
from moectl.routing.words import percent
from moectl.traces.change import Differences

if TYPE_CHECKING:
    from moectl.routing.course import Course
    from moectl.routing.rerun import Losses
    from moectl.routing.weights import Alike

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
            Line("experts, if independent", [each.ids_chance for each in found.layers], True),
        ]
        if all(each.weights is not None for each in found.layers):
            series.insert(2, Line("weight moved", [each.weights for each in found.layers]))
        told = (
            f"From {one.name} to {other.name}: {percent(most.ids)} of the experts of layer {most.point.label} differ."
        )
        svg = lines(head, told, places, series, ("layer", "share"))
        caption = (
            f"{one.name} against {other.name}, token by token. Experts: of a token's experts, those it has not in the "
            "other; weight: how much of the mixture moved; dashed: for independent choices with these loads."
        )
        yield Heading(f"Compared with {other.name}")
        yield Figure(head, svg, caption, f"{stream.name}-difference")
        there = theirs[stream.name]
        load = load_maps(there)[0]
        yield replace(load, heading=f"{other.name}: {load.heading}", name=f"{load.name}-other")
        rows = [
            [mine["layer"], *(cell for name in COMPARED for cell in (mine.get(name), their.get(name)))]
            for mine, their in zip(stream.rows, there.rows, strict=True)
        ]
        yield Table(
            ["layer", *(f"{name.replace('_', ' ')}{end}" for name in COMPARED for end in ("", ", other"))],
            shortened(rows),
        )


def courses(found: Mapping[str, Course]) -> Iterator[Part]:
    """How routing settled over more than two checkpoints."""
    for stream, course in found.items():
        last, layers = course.names[-1], course.saturation[0]
        places = [each.point.label for each in layers]
        series = [
            Line(name, [each.value for each in settled])
            for name, settled in zip(course.names, course.saturation, strict=False)
        ]
        series.append(Line("if independent", [each.chance_loads for each in layers], True))
        had = sum(each.value for each in layers) / len(layers)
        head = f"{course.names[0]} chose {percent(had)} of the experts that {last} chooses for the same token"
        svg = lines(head, course.told(stream), places, series, ("layer", "share of a token's experts"))
        caption = (
            f"Saturation: of a token's experts in {last}, those it had before; mean over tokens. Dashed: independent "
            f"choices with the loads of {course.names[0]} and {last}."
        )
        yield Heading(f"Towards {last}")
        yield Figure(head, svg, caption, f"{stream}-saturation")
        rows: list[list[Cell]] = [[each.point.label, *each.share_C.tolist()] for each in course.fluctuation]
        yield Paragraph(f"Share of the tokens whose first choice, there or later, was not yet that of {last}:")
        yield Table(["layer", *course.names[:-1]], shortened(rows))


def masked(losses: Losses) -> Iterator[Part]:
    """The loss under every mask, and what the trace alone would let one guess."""
    yield Heading("Without some experts")
    rows: list[list[Cell]] = [["none", losses.loss, None, None, None]]
    rows += [[rerun.mask.label, rerun.loss, rerun.change, *rerun.change_interval] for rerun in losses.masks]
    yield Paragraph(
        f"Nats per token of {losses.tokens:,} tokens; the change with its 95% interval, over documents. kept:r leaves "
        "a token its r heaviest experts; removed:r has the router choose again without its first r, layer:expert "
        "without that one."
    )
    yield Table(["mask", "loss", "change", "low", "high"], shortened(rows))
    if losses.held:
        least = min(losses.held, key=lambda each: each.share_K[0])
        words = f"In the trace the first expert holds {percent(float(least.share_K[0]))} of the weight or more"
        yield Paragraph(f"{words} (least in layer {least.label}): an estimate only, the loss above is what it does.")


def alike(layers: Sequence[Alike]) -> Iterator[Part]:
    """How alike the experts are by their weights, and the rows of the routers."""
    most = max(layers, key=lambda each: each.closest[2])
    one, other, cosine = most.closest
    head = f"By their weights, experts {one} and {other} of layer {most.layer} are the most alike: cosine {cosine:.3g}"
    series = [
        Line("closest experts", [max(each.closest[2], 0.0) for each in layers]),
        Line("experts, mean", [max(each.mean, 0.0) for each in layers]),
        Line(
            "router rows, mean", [None if each.router is None else max(each.router_mean or 0, 0.0) for each in layers]
        ),
        Line("unrelated, spread", [each.experts.spread for each in layers], chance=True),
    ]
    told = f"Cosines of experts' weights in {len(layers)} layers. {head}."
    svg = lines(head, told, [each.layer for each in layers], series, ("layer", "cosine"))
    caption = (
        "Cosine between all weights of two experts, and between the router's rows; below 0 is drawn as 0. Copies of a "
        "dense layer are alike in what they share; dashed: the spread of the cosine of unrelated weights."
    )
    yield Heading("By their weights")
    yield Figure(head, svg, caption, "weights")


def shortened(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Rows with numbers of four digits."""
    return [[float(f"{cell:.4g}") if isinstance(cell, float) else cell for cell in row] for row in rows]
