"""All that is said of one model or trace, or of two: analyses, verdict, what stands out, differences, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moectl.report.output import Cell
from moectl.routing.analysis import Analysis, analyse, compared, difference_rows, plain, to_json
from moectl.routing.study import Study
from moectl.routing.surprises import Surprise, surprises
from moectl.routing.verdict import Card, verdict
from moectl.traces.change import Differences

if TYPE_CHECKING:
    from moectl.routing.rerun import Losses
    from moectl.routing.weights import Alike

SCHEMA = "moectl.analyze-routing/1"


@dataclass(frozen=True)
class Report:
    """What the terminal, the page and JSON show.

    Attributes:
        analysis: of what was named first.
        other: of what it is compared with, and `differences`, what differs, by stream.
        losses: of the first model under masks.
        weights: how alike its experts are, by layer, if that was asked for.
    """

    analysis: Analysis
    other: Analysis | None = None
    differences: Mapping[str, Differences] | None = None
    losses: Losses | None = None
    weights: tuple[Alike, ...] = ()

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
            "masks": None if self.losses is None else _losses(self.losses),
            "weights": [_alike(each) for each in self.weights],
        }


def report(
    studies: Sequence[Study],
    *,
    losses: Losses | None = None,
    weights: Sequence[Alike] = (),
    adjacent: bool = False,
    seed: int = 0,
) -> Report:
    """Analyse one or two studies and compare the two; `losses` and `weights` are of the first.

    Raises:
        InputError: the two are not of the same tokens and layers.
    """
    one, *rest = (analyse(study.name, study.recordings, adjacent=adjacent, seed=seed) for study in studies)
    if not rest:
        return Report(one, losses=losses, weights=tuple(weights))
    other = replace(rest[0], name=f"{one.name} (other)") if rest[0].name == one.name else rest[0]
    return Report(one, other, compared(one, other), losses, tuple(weights))


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
