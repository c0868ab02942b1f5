"""The panel that says how sure the numbers are, and what chance means for each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moectl.routing.analysis import Stream
from moectl.routing.report import Report
from moectl.routing.verdict import doubts
from moectl.routing.words import percent
from moectl.traces.trace import Point

NULLS = (
    ("Balance", "a fair lot: each token draws k of E experts, all equally likely; mean of 200 draws of the loads"),
    (
        "Unseen experts",
        "the mean number of sets of so many experts that a fair lot leaves out, at least the chance of one",
    ),
    ("Domains", "even use, k/E; intervals are 95%, by bootstrap over (blocks of) documents"),
    ("Path to domain", "the domains' frequencies; naive Bayes, tried on documents it was not fitted to"),
    ("Repetition", "independent tokens with the loads that were measured in their domain"),
    ("Words", "token ids shuffled over the tokens"),
    ("Pairs", "even and independent choices, (k - 1)/(E - 1)"),
    ("Flow", "tokens shuffled at the next layer"),
    ("Change", "independent choices with the loads that were measured in both"),
)


def facts(found: Report, command: str) -> Iterator[tuple[str, str]]:
    """How much text there was, what is not known, and where it all comes from."""
    analysis = found.analysis
    if command:
        yield "command", command
    for stream in analysis.streams:
        statistics = stream.recording.statistics
        by_domain = np.bincount(statistics.domain_B, statistics.tokens_B, len(statistics.domains))
        parts = ", ".join(f"{count:,.0f} of {name}" for name, count in zip(statistics.domains, by_domain, strict=True))
        yield f"{stream.name}: tokens", f"{statistics.tokens:,} in {statistics.documents:,} documents: {parts}"
        traced = len(stream.recording.trace)
        yield f"{stream.name}: of the trace", f"{traced:,} tokens, {percent(stream.recording.sampled)} of all"
        for point in stream.points:
            if remarks := list(_remarks(stream, point)):
                yield f"{stream.name}: layer {point.label}", "; ".join(remarks)
    for doubt in doubts(analysis):
        yield "reservation", doubt
    for name, reason in analysis.off.items():
        yield f"not said: {name.replace('_', ' ')}", str(reason)
    for line in (*found.warnings, *analysis.about.get("notes", ())):
        yield "note", str(line)
    for name, value in analysis.about.items():
        if isinstance(value, str | int | float):
            yield name.replace("_", " "), str(value)


def _remarks(stream: Stream, point: Point) -> Iterator[str]:
    if point.score_kind == "none":
        yield "no scores were recorded"
    elif not point.selects:
        yield "biases, groups or tables choose too, not the scores alone"
    if point.null_experts:
        yield f"the last {point.null_experts} of {point.num_experts} experts compute nothing"
