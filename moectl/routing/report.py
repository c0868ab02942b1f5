"""All that is said of one model or trace, or of two: analyses, verdict, what stands out, differences, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.analysis import Analysis, analyse, compared, difference_rows, plain, to_json
from moectl.routing.masking import Mask
from moectl.routing.masks import Held, held
from moectl.routing.rerun import Losses, masked_losses
from moectl.routing.run import Settings
from moectl.routing.study import Study
from moectl.routing.surprises import Surprise, surprises
from moectl.routing.verdict import Card, verdict
from moectl.traces.change import Differences

SCHEMA = "moectl.analyze-routing/1"


@dataclass(frozen=True)
class Report:
    """What the terminal, the page and JSON show.

    Attributes:
        analysis: of what was named first.
        other: of what it is compared with, and `differences`, what differs, by stream.
        losses: of the first model under masks, and `held`, the estimates from the trace.
    """

    analysis: Analysis
    other: Analysis | None = None
    differences: Mapping[str, Differences] | None = None
    losses: Losses | None = None
    held: tuple[Held, ...] = ()

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
            "masks": None if self.losses is None else {**_losses(self.losses), "held": plain(self.held)},
        }


def report(
    studies: Sequence[Study],
    data: Sequence[str],
    settings: Settings,
    *,
    masks: Sequence[Mask] = (),
    adjacent: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Report:
    """Analyse one or two studies, compare the two, and run the first again with masks.

    Raises:
        InputError: the two are not of the same tokens and layers.
        UsageError: masks are asked for, and the first is a trace.
    """
    first, *rest = (analyse(study.name, study.recordings, adjacent=adjacent, seed=settings.seed) for study in studies)
    other = rest[0] if rest else None
    if other is not None and other.name == first.name:
        other = replace(other, name=f"{other.name} (other)")
    losses: Losses | None = None
    estimates: tuple[Held, ...] = ()
    if masks:
        checkpoint = studies[0].checkpoint
        if checkpoint is None:
            raise UsageError(
                f"{studies[0].name} is a trace.", "A mask needs a model that can be run.", "Give the model first."
            )
        length = int(first.about["sequence_length"])
        losses = masked_losses(checkpoint, data, masks, settings, length, say)
        estimates = tuple(held(first.streams[0].recording.trace))
    return Report(first, other, None if other is None else compared(first, other), losses, estimates)


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
    return {"tokens": losses.tokens, "loss": losses.loss, "reruns": masks}
