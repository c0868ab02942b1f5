"""The figures of a compressed model: what is found is the heading.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

from moectl.compress.report.findings import MEAN
from moectl.compress.report.summary import STORED, Expert, Summary
from moectl.report.charts import Bar, bars
from moectl.report.heat import DIVERGING, SEQUENTIAL, Shade, heat
from moectl.report.html import Figure
from moectl.report.output import size
from moectl.report.plots import Line, lines
from moectl.report.stacked import Part, stacked
from moectl.text import escape as visible

MOST_CELLS = 256
"""Columns of a heat map; neighbours are pooled where there are more experts."""
ABSENT, COLD = Shade("#ffffff", "no expert"), Shade("#1c1c1c", "rounded to nearest")
RATIOS = (0.25, 0.5, 0.75, 0.9, 1 / 0.9, 4 / 3, 2.0, 4.0)
LOADS = tuple(
    map(Shade, DIVERGING, ("under ¼", "to ½", "to ¾", "to 0.9", "even", "to 1.3", "to 2", "to 4", "over 4 times"))
)


def where_bits_go(summary: Summary) -> Figure:
    """The bytes of the output, by what they are for."""
    total = sum(summary.stored.values())
    parts = [
        Part(STORED[part], nbytes, f"{size(nbytes)}, {nbytes / total:.1%}") for part, nbytes in summary.stored.items()
    ]
    largest = max(parts, key=lambda part: part.value)
    title = f"{largest.value / total:.0%} of the bytes: {largest.name}"
    told = "; ".join(f"{part.name} {part.note}" for part in parts)
    svg = stacked(title, f"{size(total)} in all: {told}.", [("output", parts)])
    before, after = summary.facts["source_bytes"], summary.facts["weight_bytes"]
    return Figure(title, svg, f"{size(after)} in all, where the model had {size(before)}.", "bytes")


def losses(summary: Summary) -> Figure | None:
    """Loss before and after, domain by domain, with intervals; None if it was not measured."""
    if not summary.domains:
        return None

    def bar(series: str, measured: dict[str, Any]) -> Bar:
        return Bar(series, measured["loss"], f"{measured['loss']:.4f}", *(measured["loss_interval"] or (None, None)))

    groups = [
        (visible(domain), [bar("before", each["before"]), bar("after", each["after"])])
        for domain, each in summary.domains.items()
    ]
    mean = summary.domains[MEAN]
    change = mean["after"]["loss"] - mean["before"]["loss"]
    title = f"Loss {mean['before']['loss']:.3f} before, {mean['after']['loss']:.3f} after: {change:+.3f} nats per token"
    told = "; ".join(f"{name}: {one.value:.3f} before, {two.value:.3f} after" for name, (one, two) in groups)
    svg = bars(title, told + ".", groups, ["before", "after"], "nats per token of held-out text")
    caption = "Whiskers: 95 %, over documents, of each loss alone; the change on the same documents is surer (table)."
    return Figure(title, svg, caption, "loss")


def maps(summary: Summary) -> Iterator[Figure]:
    """Layer by expert: error, bits, zeros and tokens."""
    yield _scaled(summary, "error", "Error", lambda value: f"{value:.3g}", "relative error of outputs")
    yield _scaled(summary, "bits", "Bits", lambda value: f"{value:.3f}", "bits per weight, levels and scales counted")
    yield _scaled(summary, "zeros", "Zeros", lambda value: f"{value:.1%}", "share of weights that are zero")
    yield _tokens(summary)


def over_layers(summary: Summary) -> Iterator[Figure]:
    """Error and, where it was measured, rerouting from layer to layer."""
    places = [visible(layer.label) for layer in summary.layers]
    errors = [layer.mean("error") for layer in summary.layers]
    worst = max(range(len(errors)), key=lambda place: errors[place])
    title = f"Layer {places[worst]} has the largest error"
    told = f"From {min(errors):.3g} to {max(errors):.3g} (layer {places[worst]})."
    svg = lines(title, told, places, [Line("mean of experts", errors)], ("layer", "relative error of outputs"))
    yield Figure(title, svg, "Of what experts compute on calibration tokens, before it is added up.", "error-by-layer")
    shares = [layer.rerouted for layer in summary.layers]
    known = [(share, place) for share, place in zip(shares, places, strict=True) if share is not None]
    if known:
        share, place = max(known)
        title = f"In layer {place} {share:.1%} of the tokens take other experts than before"
        told = f"Mean over layers {fmean(share for share, _ in known):.1%}."
        svg = lines(title, told, places, [Line("other experts", shares)], ("layer", "share of held-out tokens"))
        yield Figure(title, svg, "A token counts if any of its experts is another.", "rerouted-by-layer")


def _scaled(summary: Summary, measure: str, name: str, shown: Callable[[float], str], words: str) -> Figure:
    """A map in eight even steps from the least to the largest value; cold experts are black."""
    values = [getattr(expert, measure) for layer in summary.layers for expert in layer.experts]
    low, high = min(values), max(values)
    steps = len(SEQUENTIAL)
    edges = [low + (high - low) * (step + 1) / steps for step in range(steps)]
    shades = [*(Shade(shade, f"to {shown(edge)}") for shade, edge in zip(SEQUENTIAL, edges, strict=True)), ABSENT, COLD]

    def level(experts: tuple[Expert, ...]) -> int:
        if any(expert.cold for expert in experts):
            return shades.index(COLD)
        mean = fmean(getattr(expert, measure) for expert in experts)
        return min(steps - 1, int((mean - low) / (high - low) * steps)) if high > low else 0

    places = {
        getattr(expert, measure): f"expert {number} of layer {visible(layer.label)}"
        for layer in summary.layers
        for number, expert in enumerate(layer.experts)
    }
    title = f"{name}: {shown(low)} ({places[low]}) to {shown(high)} ({places[high]})"
    return _map(summary, title, f"{words.capitalize()}.", level, shades, measure)


def _tokens(summary: Summary) -> Figure:
    counts = [expert.tokens for layer in summary.layers for expert in layer.experts]
    even = {id(expert): layer.tokens[1] for layer in summary.layers for expert in layer.experts}

    def level(experts: tuple[Expert, ...]) -> int:
        ratio = fmean(expert.tokens / even[id(expert)] if even[id(expert)] else 0.0 for expert in experts)
        return sum(ratio > edge for edge in RATIOS)

    title = f"Experts were calibrated on {min(counts):,} to {max(counts):,} tokens"
    caption = "Tokens as a multiple of an even share in the layer."
    return _map(summary, title, caption, level, [*LOADS, ABSENT], "tokens")


def _map(
    summary: Summary,
    title: str,
    caption: str,
    level: Callable[[tuple[Expert, ...]], int],
    shades: list[Shade],
    name: str,
) -> Figure:
    most = max(len(layer.experts) for layer in summary.layers)
    each = -(-most // MOST_CELLS)
    columns = range(0, most, each)
    rows = [[layer.experts[start : start + each] for start in columns] for layer in summary.layers]
    absent = shades.index(ABSENT)
    levels = [[level(experts) if experts else absent for experts in row] for row in rows]
    used = [
        shade for number, shade in enumerate(shades) if shade not in (ABSENT, COLD) or any(number in r for r in levels)
    ]
    place = {number: used.index(shade) for number, shade in enumerate(shades) if shade in used}
    note = f" A cell stands for {each} neighbouring experts." if each > 1 else ""
    svg = heat(
        title,
        f"{len(rows)} layers by {most} experts. {caption}{note}",
        [[place[number] for number in row] for row in levels],
        used,
        [visible(layer.label) for layer in summary.layers],
        [str(start) for start in columns],
        ("expert", "layer"),
    )
    return Figure(title, svg, caption + note, name)
