"""All that is said of one model or trace, or of several: analyses, verdict, what stands out, differences, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moectl.report.output import Cell
from moectl.routing.analysis import Analysis, analyse, compared, difference_rows, plain, to_json
from moectl.routing.course import Course, course
from moectl.routing.study import Study
from moectl.routing.surprises import Surprise, surprises
from moectl.routing.verdict import Card, verdict
from moectl.traces.change import Differences

if TYPE_CHECKING:
    from moectl.routing.rerun import Losses
    from moectl.routing.weights import Alike
    from moectl.routing.whatif.advise import Advice
    from moectl.routing.whatif.finding import Finding

SCHEMA = "moectl.analyze-routing/1"


@dataclass(frozen=True)
class Report:
    """What the terminal, the page and JSON show.

    Attributes:
        analysis: of what was named first.
        other: of what it is compared with, and `differences`, what differs, by stream.
        courses: how routing settled over more than two checkpoints, of which `other` is the last, by stream.
        losses: of the first model under masks.
        weights: how alike its experts are, by layer, if that was asked for.
        findings: what would have been, by stream: other routers, capacities, caches, placements.
        advice: what to do with it on a machine, if that was asked for.
    """

    analysis: Analysis
    other: Analysis | None = None
    differences: Mapping[str, Differences] | None = None
    courses: Mapping[str, Course] = field(default_factory=dict)
    losses: Losses | None = None
    weights: tuple[Alike, ...] = ()
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)
    advice: Advice | None = None

    @property
    def answered(self) -> bool:
        """Whether more was asked than what happened."""
        return bool(self.findings or self.advice)

    @property
    def cards(self) -> list[Card]:
        """The verdict."""
        return verdict(self.analysis)

    @property
    def surprises(self) -> list[Surprise]:
        """What stands out."""
        return surprises(self.analysis)

    @property
    def warnings(self) -> list[str]:
        """What the reader has to know of the recordings, even in quiet mode."""
        both = [self.analysis, *([self.other] if self.other else [])]
        return [str(line) for each in both for line in each.about.get("warnings", ())]

    @property
    def rows(self) -> dict[str, list[dict[str, Cell]]]:
        """The numbers of the layers, of both, and of what differs: what a gate looks at."""
        both = [self.analysis, *([self.other] if self.other else [])]
        found = {each.name: [row for stream in each.streams for row in stream.rows] for each in both}
        for differences in (self.differences or {}).values():
            found.setdefault("difference", []).extend(difference_rows(differences))
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "verdict": plain(self.cards),
            "surprises": plain(self.surprises),
            "model": to_json(self.analysis),
            "other": None if self.other is None else to_json(self.other),
            "differences": plain(self.differences),
            "courses": {stream: found.to_json() for stream, found in self.courses.items()},
            "masks": None if self.losses is None else _losses(self.losses),
            "weights": [_alike(each) for each in self.weights],
            "what_if": {stream: plain(found) for stream, found in self.findings.items()},
            "advice": plain(self.advice),
        }


def report(
    studies: Sequence[Study],
    *,
    losses: Losses | None = None,
    weights: Sequence[Alike] = (),
    adjacent: bool = False,
    seed: int = 0,
) -> Report:
    """Analyse the first study and the last, and compare all; `losses` and `weights` are of the first.

    Raises:
        InputError: they are not of the same tokens and layers.
    """
    first, last = studies[0], studies[-1]
    one = analyse(first.name, first.recordings, adjacent=adjacent, seed=seed)
    if len(studies) == 1:
        return Report(one, losses=losses, weights=tuple(weights))
    other = analyse(last.name, last.recordings, adjacent=adjacent, seed=seed)
    other = replace(other, name=f"{one.name} (other)") if other.name == one.name else other
    return Report(one, other, compared(one, other), _courses(studies), losses, tuple(weights))


def _courses(studies: Sequence[Study]) -> dict[str, Course]:
    """Nothing for two: their differences say it."""
    if len(studies) < 3:
        return {}
    names = [study.name for study in studies]
    unique = [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]
    return {
        stream: course(unique, [study.recordings[stream].trace for study in studies])
        for stream, recording in studies[0].recordings.items()
        if len(recording.trace) and all(stream in study.recordings for study in studies)
    }


def _alike(each: Alike) -> dict[str, Any]:
    one, other, cosine = each.closest
    return {
        "layer": each.layer,
        "cosine_mean": each.mean,
        "cosine_spread": each.experts.spread,
        "closest": {"experts": [one, other], "cosine": cosine, "centred": float(each.experts.centred_EE[one, other])},
        "router_cosine_mean": each.router_mean,
    }


def _losses(losses: Losses) -> dict[str, Any]:
    masks = [
        {
            "mask": rerun.mask.label,
            "loss": rerun.loss,
            "change": rerun.change,
            "change_interval": list(rerun.change_interval),
            "scaled": list(rerun.scaled),
        }
        for rerun in losses.masks
    ]
    return {"tokens": losses.tokens, "loss": losses.loss, "reruns": masks, "held": plain(losses.held)}
