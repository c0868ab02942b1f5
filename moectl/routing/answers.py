"""What a user asks of a trace beyond what happened: other routers, what-ifs, advice; and the tables that answer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.errors import InputError, UsageError
from moectl.report.output import Cell
from moectl.routers.spelling import parse as parse_routers
from moectl.routing.study import Study
from moectl.routing.whatif.finding import Finding
from moectl.routing.whatif.registry import WHAT_IFS, WhatIf, find
from moectl.spelling import filled, split
from moectl.text import escape
from moectl.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from moectl.routers.spelling import Named
    from moectl.routing.report import Report
    from moectl.routing.whatif.advise import Advice
    from moectl.routing.whatif.machine import Machine

ALL = "all"
Say = Callable[[str], None]


@dataclass(frozen=True)
class PlacementFile:
    """A file that a placement is written to, the engine that reads it, and whether it may be replaced."""

    path: Path
    engine: str
    overwrite: bool = False


@dataclass(frozen=True)
class Asked:
    """Questions, in the order in which they are answered.

    Attributes:
        routers: to route again with.
        what_ifs: each with its options.
        optional: what is left out where a trace cannot answer it, for `all` was asked.
        machine: to advise for.
        placement: where one is written to.
    """

    routers: Sequence[Named] = ()
    what_ifs: Sequence[tuple[WhatIf, Any]] = ()
    optional: bool = False
    machine: Machine | None = None
    placement: PlacementFile | None = None

    def __bool__(self) -> bool:
        return bool(self.routers or self.what_ifs or self.machine)


def parse(
    replay: str | None,
    what_if: Sequence[str],
    machine: Machine,
    placement: PlacementFile | None = None,
    *,
    advise: bool = False,
) -> Asked:
    """What the command line asks.

    Args:
        replay: `switch:cf=1.25,expert-choice`.
        what_if: each `cache:expert_mb=8,placement` or `all`.
        machine: whose GPUs and nodes every what-if takes that has them, unless it is given its own.
        placement: where one is written to; it is a question then.
        advise: whether the machine is asked about as a whole.

    Raises:
        UsageError: there is no such router, what-if or option, or `all` is given one.
    """
    named = [part for text in what_if for part in split(text)]
    optional = any(name == ALL for name, _ in named)
    given = {name: options for name, options in named if name != ALL}
    if any(name == ALL and options for name, options in named):
        raise UsageError(
            f"{ALL} takes no options.", "They differ from what-if to what-if.", f"Write {ALL},cache:expert_mb=8, say."
        )
    wanted = [each.name for each in WHAT_IFS] if optional else []
    if placement is not None:
        wanted.append("placement")
    shared = {"gpus": machine.gpus, "gpus_per_node": machine.gpus // machine.nodes}
    if machine.nodes > 1:
        shared["nodes"] = machine.nodes
    questions = []
    for name in dict.fromkeys([*given, *wanted]):
        each = find(name)
        what = f"The what-if {name}"
        questions.append((each, filled(each.load().Options, given.get(name, {}), what, defaults=shared)))
    routers = parse_routers(replay) if replay else ()
    return Asked(routers, questions, optional, machine if advise else None, placement)


def answer(
    study: Study, asked: Asked, seed: int = 0, say: Say = lambda _text: None
) -> tuple[dict[str, list[Finding]], Advice | None]:
    """Answer all of it from the study's trace: findings by stream, and advice for the first.

    Raises:
        UsageError: a router or what-if makes no sense for the trace.
        InputError: the trace lacks what was asked about.
    """
    findings = {}
    for stream, recording in study.recordings.items():
        if recording.sampled < 1:
            say(f"What-ifs are about the trace: {recording.sampled:.0%} of the tokens read, whole documents.")
        findings[stream] = list(_findings(recording.trace, asked, seed, say))
    if len(findings) > 1 and (asked.machine or asked.placement):
        say(f"Advice and placement are of the {next(iter(findings))} alone.")
    advice = None
    if asked.machine is not None:
        from moectl.routing.whatif.advise import advise
        from moectl.routing.whatif.machine import facts

        traces = [recording.trace for recording in study.recordings.values()]
        experts = [sum(routed.point.num_experts for routed in trace.layers) for trace in traces]
        model = None if study.checkpoint is None else facts(study.checkpoint, experts[0] / max(sum(experts), 1))
        advice = advise(traces[0], asked.machine, model)
    if asked.placement is not None:
        say(_placed(next(iter(findings.values())), asked.placement))
    return findings, advice


def _findings(trace: RoutingTrace, asked: Asked, seed: int, say: Say) -> Iterator[Finding]:
    if asked.routers:
        from moectl.routing.whatif.replay import replay

        yield replay(trace, asked.routers, seed)
    for each, options in asked.what_ifs:
        try:
            yield each.load().run(trace, options)
        except (InputError, UsageError) as error:
            if not asked.optional:
                raise
            say(f"{each.name} is left out: {error}")


def _placed(found: Sequence[Finding], file: PlacementFile) -> str:
    from moectl.routing.whatif.placement import write_placement

    finding = next(each for each in found if each.name == "placement")
    started = write_placement(file.path, finding, file.engine, overwrite=file.overwrite)
    return f"Start the engine with {started}"


def tables(found: Report) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[Cell]]]]:
    """A title, columns and rows for each finding, and for the advice."""
    for stream, findings in found.findings.items():
        for each in findings:
            yield f"{stream} {each.name}" if len(found.findings) > 1 else each.name, each.columns, each.rows
    if found.advice is not None:
        rows = [(step.topic, step.text, step.assumption) for step in found.advice.steps]
        yield "advice", ("topic", "advice", "rests on"), rows


def words(found: Report, width: int = 80) -> list[str]:
    """What is said beside the tables: headlines, and what they rest on; below the advice the commands behind it."""
    lines = []
    for findings in found.findings.values():
        for each in findings:
            lines += fill(f"{each.name}: {each.headline}", width)
            lines += [line for text in each.assumptions for line in fill(text, width, "  ", "- ")]
    if found.advice is not None:
        lines += fill(f"Advice: {found.advice.summary}", width)
        lines += [f"  {step.command}" for step in found.advice.steps]
    return lines


def fill(text: str, width: int, indent: str = "", bullet: str = "") -> list[str]:
    """Lines of at most that many characters."""
    return textwrap.wrap(
        escape(text),
        width,
        initial_indent=indent + bullet,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
