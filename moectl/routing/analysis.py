"""Everything that is said of recordings: the metrics of each stream, one row of numbers per layer, and JSON of it all.

Legend: E experts, K experts per token, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from moectl.report.output import Cell
from moectl.traces.balance import Balance, balance
from moectl.traces.change import Differences, difference
from moectl.traces.coactivation import Coactivation, coactivation
from moectl.traces.domains import DomainShare, Separation, separation, specialisation
from moectl.traces.flow import Flow, Paths, flow, paths
from moectl.traces.hot import Coverage, Needed, Slots, coverage, needed, slots
from moectl.traces.locality import ContextIndependence, Repetition, context_independence, repetition
from moectl.traces.scores import ScoreMetrics, pooled_aux, score_metrics
from moectl.traces.store import Recording
from moectl.traces.trace import Point
from moectl.traces.vocabulary import Vocabulary, vocabulary

TARGETS = ("input", "next", "predicted")

MEASURES = {
    "tokens": "tokens counted",
    "max_vio": "by how much the busiest expert exceeds an even share, in such shares",
    "max_vio_fair": "the same if every token drew its experts by a fair lot, mean",
    "max_vio_batch": "the mean of max_vio over batches",
    "cv": "standard deviation of the loads over their mean",
    "gini": "0 where all loads are equal",
    "entropy": "of the loads, as a part of ln(experts)",
    "effective": "equally loaded experts of the same entropy",
    "busiest": "the expert with the largest load",
    "busiest_share": "share of the tokens that use it",
    "busiest_chance": "what even loads give: experts per token / experts",
    "unseen": "experts without a token",
    "unseen_chance": "at most how likely so many are under a fair lot",
    "dropped": "share of the assignments that went nowhere",
    "aux": "balancing loss of this layer alone: experts per token if balanced",
    "z": "mean square of logsumexp of the router's logits",
    "router_entropy": "of a token's distribution over experts, as a part of ln(experts)",
    "margin": "median lead of the last chosen expert over the next, in probability",
    "repeat": "share of tokens whose first choice is that of the token before",
    "repeat_chance": "the same for independent tokens with the loads of their domain",
    "repeat_any": "share of tokens with any expert of the token before",
    "repeat_any_chance": "the same for independent tokens with the loads of their domain",
    "vocabulary": "largest share of a token id that one expert is the first choice of, mean over frequent ids",
    "vocabulary_chance": "the same after the ids were shuffled",
    "context_independence": "how much of the first choice the token id alone decides, chance taken off",
    "next_layer": "how much of the next layer's first choice this layer's tells, chance taken off",
    "hot": "share of the assignments that a quarter of the experts takes, the busiest of the other documents",
    "hot_chance": "what even loads give",
    "needed": "experts that hold 90% of a token's probability, mean",
}
"""The numbers of a layer, in their order; each is also what `--fail-on` can name."""

DIFFERENCES = {
    "changed": "share of a token's experts that it has not in the other",
    "changed_chance": "the same for independent choices with these loads",
    "changed_first": "share of tokens whose first choice is another",
    "changed_first_chance": "the same for independent choices with these loads",
    "changed_tokens": "share of tokens whose experts are not the same ones",
    "moved": "share of the mixture's weight that moved",
}
"""The numbers of a layer of two that are compared."""


@dataclass(frozen=True)
class Stream:
    """All metrics of one stream of tokens, `decoder` or `encoder`; those that its recording cannot answer are empty.

    Lists that are not empty have an entry per point, in the order of `balance`, if their entries name no point.
    """

    name: str
    recording: Recording
    balance: list[Balance]
    fair_max_vio: list[float]
    scores: list[ScoreMetrics]
    pooled_aux: float | None
    domains: list[DomainShare]
    separation: Separation | None
    vocabulary: dict[str, list[Vocabulary]]
    coactivation: list[Coactivation]
    repetition: list[Repetition]
    context: list[ContextIndependence]
    flow: list[Flow]
    paths: Paths | None
    hot: list[Coverage]
    slots: Slots | None
    needed: list[Needed]

    @property
    def points(self) -> list[Point]:
        """The MoE layers."""
        return [each.point for each in self.balance]

    @cached_property
    def rows(self) -> list[dict[str, Cell]]:
        """The numbers of MEASURES that are known, for every layer, after its `layer`, `experts` and `top_k`."""
        return [self._row(number, point) for number, point in enumerate(self.points)]

    def _row(self, number: int, point: Point) -> dict[str, Cell]:
        load = self.balance[number]
        row: dict[str, Cell] = {"layer": point.label, "experts": point.num_experts, "top_k": point.top_k}
        row |= {name: getattr(load, name) for name in ("tokens", "max_vio", "cv", "gini", "entropy", "effective")}
        row |= {name: getattr(load, name) for name in ("busiest", "busiest_share", "unseen_chance", "dropped")}
        row |= {"unseen": len(load.unseen), "max_vio_fair": self.fair_max_vio[number]}
        row |= {"max_vio_batch": load.max_vio_batch, "busiest_chance": point.top_k / point.num_experts}
        for scores in self.scores:
            if scores.point == point:
                row |= {"aux": scores.aux, "z": scores.z, "margin": scores.margin_median}
                row["router_entropy"] = scores.entropy_share
        if self.repetition:
            repeats = self.repetition[number]
            row |= {"repeat": repeats.first, "repeat_chance": repeats.first_null}
            row |= {"repeat_any": repeats.any, "repeat_any_chance": repeats.any_shuffled}
        if words := self.vocabulary.get("input"):
            row |= {"vocabulary": words[number].value, "vocabulary_chance": words[number].null}
        if self.context:
            row["context_independence"] = self.context[number].value
        for each in self.flow:
            if each.source == point:
                row["next_layer"] = each.value
        row["hot"], row["hot_chance"] = hottest(self.hot[number])
        for needed_here in self.needed:
            if needed_here.point == point:
                row["needed"] = needed_here.mean
        return {name: row[name] for name in ("layer", "experts", "top_k", *MEASURES) if name in row}


@dataclass(frozen=True)
class Analysis:
    """What is said of one model or trace."""

    name: str
    streams: tuple[Stream, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def off(self) -> dict[str, str]:
        """Why an analysis, named as its function, says nothing."""
        return dict(self.about.get("off", {}))


def analyse(
    name: str,
    recordings: Mapping[str, Recording],
    *,
    adjacent: bool = False,
    seed: int = 0,
) -> Analysis:
    """Ask every question of the recordings; `adjacent` counts pairs of experts as OLMoE's released code does."""
    about = dict(next(iter(recordings.values())).trace.about)
    off = about.get("off", {})
    streams = (_stream(stream, recording, off, adjacent, seed) for stream, recording in recordings.items())
    return Analysis(name, tuple(streams), about)


def _stream(name: str, recording: Recording, off: Mapping[str, str], adjacent: bool, seed: int) -> Stream:
    statistics, trace = recording.statistics, recording.trace
    traced = len(trace) > 0

    def ask(function: Callable[..., Any], empty: Any, /, *arguments: Any, **options: Any) -> Any:
        return empty if not traced or function.__name__ in off else function(trace, *arguments, **options)

    several = len(set(map(int, statistics.domain_B[statistics.tokens_B > 0]))) > 1
    return Stream(
        name,
        recording,
        balance=balance(statistics),
        fair_max_vio=[
            fair_max_vio(statistics.tokens, load.point.num_experts, load.point.top_k) for load in statistics.loads
        ],
        scores=score_metrics(statistics),
        pooled_aux=pooled_aux(statistics) if score_metrics(statistics) else None,
        domains=specialisation(statistics, seed=seed) if several and "specialisation" not in off else [],
        separation=ask(separation, None, seed=seed) if several else None,
        vocabulary={target: ask(vocabulary, [], target, seed=seed) for target in TARGETS},
        coactivation=ask(coactivation, [], adjacent),
        repetition=ask(repetition, [], seed=seed),
        context=ask(context_independence, [], seed=seed),
        flow=ask(flow, [], seed=seed),
        paths=ask(paths, None),
        hot=coverage(statistics),
        slots=ask(slots, None),
        needed=ask(needed, []),
    )


@lru_cache(maxsize=1024)
def fair_max_vio(tokens: int, experts: int, top_k: int) -> float:
    """The MaxVio that a fair lot gives on average, by 200 draws of loads: few tokens are never even.

    Loads are drawn each for itself; taking off their mean and widening what is left gives them the covariance of loads
    that add up to k per token.
    """
    if tokens == 0 or top_k == experts:
        return 0.0
    drawn = np.random.default_rng(0).binomial(tokens, top_k / experts, (200, experts))
    over = (drawn.max(1) - drawn.mean(1)).mean() * math.sqrt(experts / (experts - 1))
    return float(over / (tokens * top_k / experts))


def hottest(cover: Coverage) -> tuple[float, float]:
    """Share of the assignments that the busiest quarter of the experts takes, and what even loads give."""
    experts = cover.point.num_experts
    number = max(1, round(experts / 4))
    share_E = cover.share_E if cover.held_out_E is None else cover.held_out_E
    return float(share_E[number - 1]), number / experts


def compared(one: Analysis, other: Analysis) -> dict[str, Differences]:
    """How the routing of the same tokens differs, by stream.

    Raises:
        InputError: they are not the same tokens, or not as many layers.
    """
    theirs = {stream.name: stream for stream in other.streams}
    return {
        stream.name: difference(stream.recording.trace, theirs[stream.name].recording.trace)
        for stream in one.streams
        if stream.name in theirs and len(stream.recording.trace)
    }


def difference_rows(found: Differences) -> list[dict[str, Cell]]:
    """The numbers of DIFFERENCES for every layer, after its `layer`."""
    return [
        {
            "layer": each.point.label,
            "changed": each.ids,
            "changed_chance": each.ids_chance,
            "changed_first": each.first,
            "changed_first_chance": each.first_chance,
            "changed_tokens": each.tokens,
            "moved": each.weights,
        }
        for each in found.layers
    ]


def to_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers as plain data; the E x E matrices stay in the trace, their strongest pairs are here."""
    return {
        "name": analysis.name,
        "about": plain(analysis.about),
        "streams": {
            stream.name: {
                "tokens": stream.recording.statistics.tokens,
                "documents": stream.recording.statistics.documents,
                "traced": len(stream.recording.trace),
                "sampled": stream.recording.sampled,
                "layers": stream.rows,
                "pooled_aux": stream.pooled_aux,
                **{
                    name: plain(getattr(stream, name))
                    for name in ("balance", "domains", "separation", "vocabulary", "coactivation", "repetition")
                },
                **{
                    name: plain(getattr(stream, name))
                    for name in ("context", "flow", "paths", "hot", "slots", "needed")
                },
            }
            for stream in analysis.streams
        },
    }


def plain(value: Any) -> Any:
    """Dataclasses, arrays and mappings as plain data; a point is its label, E x E matrices are left out."""
    if isinstance(value, Point):
        return value.label
    if is_dataclass(value) and not isinstance(value, type):
        kept = (each.name for each in fields(value) if not each.name.endswith("_EE"))
        return {name: plain(getattr(value, name)) for name in kept}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
