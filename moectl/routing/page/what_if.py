"""What would have been, on the page: a section per finding with its curves, a slider under each, its table, and advice.

Without the script every figure, table and assumption is there; the script moves a marker along a curve and says, in
words, what all of its lines are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from math import isfinite
from typing import TYPE_CHECKING, Literal

from moectl.report.curves import Trail, across, curves, spelled
from moectl.report.html import Figure, Heading, Paragraph, Part, Table
from moectl.report.output import Cell
from moectl.report.svg import number
from moectl.routing.page.comparison import shortened
from moectl.routing.page.payload import spread
from moectl.routing.report import Report
from moectl.routing.whatif.registry import WHAT_IFS
from moectl.routing.words import percent
from moectl.text import escape as visible
from moectl.text import shown

if TYPE_CHECKING:
    from moectl.routing.whatif.advise import Advice
    from moectl.routing.whatif.finding import Curve, Finding

ROWS = 600_000
"""Bytes of the tables of all findings together: the page stays below 8 MB. Of longer ones evenly spaced rows stay."""
SAMPLE = 50
"""Rows whose size tells how many fit."""
OPEN = 8
"""Rows of a table that is not folded."""
NAME = 60
"""Characters of the name of a line, which may be a domain's."""

QUESTIONS = {each.name: each.question for each in WHAT_IFS} | {"replay": "What would other routers have chosen?"}

INTRODUCTION = (
    "Computed from the trace at every place of a curve that the slider stops at. A dashed line is what chance gives; a "
    "thin one cannot be beaten."
)


def what_ifs(found: Report) -> Iterator[Part]:
    """A section for each finding of each stream, and for what the advice rests on."""
    several = len(found.findings) > 1
    chapters = {f"What if, {stream}" if several else "What if": each for stream, each in found.findings.items() if each}
    if found.advice is not None and found.advice.findings:
        chapters["What the advice rests on"] = tuple(found.advice.findings.values())
    findings = [finding for each in chapters.values() for finding in each]
    domains = {
        name: place
        for stream in found.analysis.streams
        for place, name in enumerate(stream.recording.statistics.domains)
    }
    colours = numbered([curve for finding in findings for curve in finding.curves], domains)
    places = count(1)
    for chapter, (heading, each) in enumerate(chapters.items()):
        yield Heading(heading)
        if chapter == 0:
            yield Paragraph(INTRODUCTION)
        for finding in each:
            yield Section(finding, colours, f"what-if-{next(places)}-{finding.name}", ROWS // len(findings))


def advised(advice: Advice) -> Iterator[Part]:
    """What to do, step by step, with what each step rests on."""
    yield Heading("Advice")
    yield _Advised(advice)


def numbered(drawn: Iterable[Curve], fixed: Mapping[str, int]) -> dict[str, int]:
    """The number of the colour and sign of each line: one per name everywhere, and no two the same in a curve.

    Names in `fixed` have theirs, which they have in other figures as well.
    """
    groups = [[name for name in curve.lines if kind(curve, name) == "line"] for curve in drawn]
    names = list(dict.fromkeys(name for group in groups for name in group))
    found = {name: fixed[name] for name in names if name in fixed}
    for name in names:
        taken = {found[other] for group in groups if name in group for other in group if other in found}
        found.setdefault(name, next(free for free in count() if free not in taken))
    return found


def kind(curve: Curve, name: str) -> Literal["line", "chance", "bound"]:
    """What a line is; `random routing, Belady` is chance as `random routing` is."""
    if name == curve.bound:
        return "bound"
    by_chance = curve.chance is not None and (name == curve.chance or name.startswith(f"{curve.chance}, "))
    return "chance" if by_chance else "line"


@dataclass(frozen=True)
class Section:
    """A finding: `numbers` are the colours of its lines, `name` that of its files, `room` bytes are for its table."""

    finding: Finding
    numbers: Mapping[str, int]
    name: str
    room: int

    def html(self) -> str:
        """Question, answer, curves with their sliders, table, assumptions."""
        finding = self.finding
        question = QUESTIONS.get(finding.name, finding.name)
        drawn = "".join(
            _moving(curve, self.numbers, f"{self.name}-{place}")
            for place, curve in enumerate(finding.curves, 1)
            if len(curve.x)
        )
        items = "".join(f"<li>{_text(each)}</li>" for each in finding.assumptions)
        rests = f'<ul class="rests note" aria-label="What this rests on">{items}</ul>' if items else ""
        return (
            f'<section class="panel what-if"><p class="asked note">{_text(question)}</p>'
            f"<h3>{_text(finding.headline)}</h3>{drawn}{_table(finding, self.room)}{rests}</section>"
        )


@dataclass(frozen=True)
class _Advised:
    advice: Advice

    def html(self) -> str:
        """A list."""
        steps = "".join(
            f"<li><strong>{_text(step.topic.capitalize())}.</strong> {_text(step.text)} "
            f'<span class="note">{_text(step.assumption)}</span><code>{_text(step.command)}</code></li>'
            for step in self.advice.steps
        )
        return f'<section class="panel advice"><h3>{_text(self.advice.summary)}</h3><ol>{steps}</ol></section>'


def _table(finding: Finding, room: int) -> str:
    """The table, folded if it is long; of one that is larger than `room`, as some of its rows tell, those that fit."""
    finite: list[list[Cell]] = [
        [None if isinstance(cell, float) and not isfinite(cell) else cell for cell in row] for row in finding.rows
    ]
    if not finite:
        return ""
    rows = shortened(finite)
    some = [rows[row] for row in spread(len(rows), SAMPLE)]
    kept = spread(len(rows), room * len(some) // len(Table(finding.columns, some).html()))
    made = Table(finding.columns, [rows[row] for row in kept]).html()
    if len(rows) <= OPEN:
        return made
    told = f"{len(rows)} rows" if len(kept) == len(rows) else f"{len(kept)} of {len(rows)} rows, evenly spaced"
    return f"<details><summary>Table: {told}</summary>{made}</details>"


def _moving(curve: Curve, numbers: Mapping[str, int], name: str) -> str:
    """A curve as a figure, and a slider that says what its lines are at an x."""
    trails = _trails(curve, numbers)
    heading, start = _furthest(curve, trails)
    scale = across(curve.x)
    named = {which: "; ".join(trail.series for trail in trails if trail.kind == which) for which in ("chance", "bound")}
    said = [f"Dashed: {named['chance']}."] * bool(named["chance"])
    said += [f"Thin: {named['bound']}, which cannot be beaten."] * bool(named["bound"])
    said += ["The axis below is logarithmic."] * scale.log
    told = f"{curve.y_label} over {curve.x_label}, {spelled(curve.x[0])} to {spelled(curve.x[-1])}. "
    told += "; ".join(f"{trail.series}: {_course(trail.values, curve.percent)}" for trail in trails)
    svg = curves(heading, f"{told}.", curve.x, trails, (curve.x_label, curve.y_label), percent=curve.percent)
    drawn = Figure(heading, svg, " ".join(said), name).html()
    if len(curve.x) < 2:
        return drawn
    data = {
        "at": [round(scale(x), 1) for x in curve.x],
        "x": [float(x) for x in curve.x],
        "percent": curve.percent,
        "lines": [[_labelled(trail), [_rounded(value, curve.percent) for value in trail.values]] for trail in trails],
    }
    written = json.dumps(data, separators=(",", ":"), allow_nan=False)
    slider = f'<input type="range" min="0" max="{len(curve.x) - 1}" value="{start}">'
    return (
        f'<div class="moving" data-curve="{escape(written)}">{drawn}'
        f'<label class="scripted slide" hidden>{slider}<span>{_text(curve.x_label)} <output></output></span></label>'
        '<p class="scripted told" aria-live="polite" hidden></p></div>'
    )


def _trails(curve: Curve, numbers: Mapping[str, int]) -> list[Trail]:
    """Lines with their colours, those of chance with their dashes; what is no number is no value."""
    dashes = count()
    return [
        Trail(
            shown(name, NAME),
            [None if value is None or not isfinite(value) else float(value) for value in values],
            next(dashes) if kind(curve, name) == "chance" else numbers.get(name, 0),
            kind(curve, name),
        )
        for name, values in curve.lines.items()
    ]


def _furthest(curve: Curve, trails: Sequence[Trail]) -> tuple[str, int]:
    """What is to be seen and its place: where the first line is furthest from chance, or its first and last value."""
    lead = next((trail for trail in trails if trail.kind != "chance"), None)
    chance = next((trail for trail in trails if trail.kind == "chance"), None)
    middle = len(curve.x) // 2
    if lead is None or all(value is None for value in lead.values):
        return curve.title, middle
    if chance is None:
        return f"{curve.title}: {lead.series} {_course(lead.values, curve.percent)}", middle
    gaps = [
        (abs(value - null), -place)
        for place, (value, null) in enumerate(zip(lead.values, chance.values, strict=True))
        if value is not None and null is not None
    ]
    if not gaps:
        return curve.title, middle
    at = -max(gaps)[1]
    value, null = (_course(trail.values[at : at + 1], curve.percent) for trail in (lead, chance))
    return f"{curve.title}: {lead.series} {value} at {spelled(curve.x[at])}, where chance gives {null}", at


def _labelled(trail: Trail) -> str:
    """Its name for the slider's words, with what it is where the name does not say it."""
    what = {"line": "", "chance": "" if "chance" in trail.series else " (chance)", "bound": " (cannot be beaten)"}
    return trail.series + what[trail.kind]


def _course(values: Sequence[float | None], share: bool) -> str:
    """The first and the last known value."""
    known = [percent(value) if share else number(value) for value in values if value is not None]
    if not known:
        return "no value"
    return known[0] if known[0] == known[-1] else f"from {known[0]} to {known[-1]}"


def _rounded(value: float | None, share: bool) -> float | None:
    return None if value is None else round(value, 6) if share else float(f"{value:.4g}")


def _text(words: str) -> str:
    return escape(visible(words))
