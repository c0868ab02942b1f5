"""The figures of a stream: what is found is the heading, chance is dashed, axes start at 0.

Legend: E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moectl.report.heat import DIVERGING, SEQUENTIAL, Shade, heat
from moectl.report.html import Figure
from moectl.report.plots import Line, Strip, columns, lines
from moectl.report.ribbons import OTHERS, ribbons
from moectl.routing.analysis import Stream
from moectl.routing.judge import apart, keeps
from moectl.routing.verdict import contrast
from moectl.routing.words import layers, percent
from moectl.traces.coactivation import Coactivation
from moectl.traces.domains import DomainShare
from moectl.traces.flow import Flow

MOST_CELLS = 256
"""Columns of the heat map; neighbours are pooled where there are more experts."""
MOST_BARS = 64
"""Experts in the bars of domains: those whose shares differ most between domains."""
STRONGEST = 16
"""Experts in a map of pairs: those of the strongest pairs, as in OLMoE's figures (arXiv 2409.02060)."""
FLOWS = 12
"""From expert to expert, in a picture of flow."""

RATIOS = (0.25, 0.5, 0.75, 0.9, 1 / 0.9, 4 / 3, 2.0, 4.0)
LOADS = (
    *map(Shade, DIVERGING, ("under ¼", "to ½", "to ¾", "to 0.9", "even", "to 1.3", "to 2", "to 4", "over 4 times")),
    Shade("#1c1c1c", "not seen"),
)


def pool(stream: Stream) -> int:
    """How many neighbouring experts a cell of the heat map stands for."""
    return -(-max(point.num_experts for point in stream.points) // MOST_CELLS)


def load_maps(stream: Stream) -> tuple[Figure, Figure]:
    """Layer by expert, in the order of the experts' numbers and of their loads."""
    each = pool(stream)
    worst = max(stream.balance, key=lambda load: load.max_vio)
    title = (
        f"Expert {worst.busiest} of layer {worst.point.label} is the busiest: "
        f"{1 + worst.max_vio:.2g} times an even share, {percent(worst.busiest_share)} of the tokens"
    )
    note = f" A cell stands for {each} neighbouring experts." if each > 1 else ""
    found = []
    for by_load in (False, True):
        shares = [load.share_E * load.point.num_experts for load in stream.balance]
        rows = [_pooled(np.sort(ratio_E)[::-1] if by_load else ratio_E, each) for ratio_E in shares]
        count = max(map(len, rows))
        svg = heat(
            title,
            f"{len(rows)} layers by {worst.point.num_experts} experts; the load as a multiple of an even share.{note}",
            [[_load_level(ratio) for ratio in row_C] for row_C in rows],
            LOADS,
            [point.label for point in stream.points],
            [str(column * each) for column in range(count)],
            ("experts by load" if by_load else "expert", "layer"),
        )
        caption = f"Load as a multiple of an even share.{note}"
        found.append(Figure(title, svg, caption, f"{stream.name}-load{'-sorted' * by_load}"))
    return found[0], found[1]


def by_layer(stream: Stream) -> Iterator[Figure]:
    """Balance, repetition, words and the hottest quarter over the layers."""
    places = [point.label for point in stream.points]

    def drawn(
        heading: str, measures: Sequence[tuple[str, str, bool]], measured: str, caption: str, name: str
    ) -> Figure:
        series = [
            Line(series, [_at_least_0(row.get(measure)) for row in stream.rows], chance)
            for measure, series, chance in measures
        ]
        told = "; ".join(_told(each, places) for each in series)
        svg = lines(heading, f"{measured} over {len(places)} layers. {told}.", places, series, ("layer", measured))
        return Figure(heading, svg, caption, f"{stream.name}-{name}")

    worst = max(stream.balance, key=lambda load: load.max_vio)
    yield drawn(
        f"Layer {worst.point.label} is the least even",
        [("max_vio", "busiest expert", False), ("max_vio_fair", "a fair lot", True)],
        "excess over an even share, in even shares (MaxVio)",
        "0 is perfect balance; a fair lot of as many tokens is never quite even.",
        "balance",
    )
    if stream.repetition:
        most = max(stream.repetition, key=lambda each: each.first - each.first_null)
        kept = [each.point.label for each in stream.repetition if keeps(each)]
        yield drawn(
            f"Consecutive tokens keep their expert in {layers(kept)}"
            if kept
            else "Consecutive tokens share experts hardly more than by chance",
            [
                ("repeat", "same first choice", False),
                ("repeat_chance", "if independent", True),
                ("repeat_any", "any in common", False),
                ("repeat_any_chance", "if independent ", True),
            ],
            "share of tokens",
            f"Most in layer {most.point.label}: {percent(most.first)} repeat the first choice of the token before.",
            "repetition",
        )
    if stream.context:
        most_told = max(stream.context, key=lambda each: each.value)
        yield drawn(
            f"The token id tells {percent(max(most_told.value, 0.0))} of the choice in layer {most_told.point.label}",
            [
                ("vocabulary", "share one expert gets of an id", False),
                ("vocabulary_chance", "that share, ids shuffled", True),
                ("context_independence", "told by the id", False),
                ("next_layer", "next layer, told by this", False),
            ],
            "share",
            "Told: of the entropy of a first choice, what the id, or this layer's first choice, says; 0 is what "
            "shuffled tokens give. An id's share is of ids that occur at least 10 times.",
            "words",
        )
    hottest = max(stream.rows, key=lambda row: _float(row["hot"]) or 0.0)
    yield drawn(
        f"A quarter of the experts takes up to {percent(_float(hottest['hot']) or 0.0)} of the work",
        [("hot", "busiest quarter", False), ("hot_chance", "if even", True)],
        "share of assignments",
        "The quarter is the busiest of one half of the documents, counted on the other, where there are two halves.",
        "hot",
    )


def domain_bars(stream: Stream, shares: DomainShare) -> Figure | None:
    """Which share of each domain's tokens uses which expert, with 95% intervals; None if no expert was used."""
    names = stream.recording.statistics.domains
    present = np.flatnonzero(shares.share_DE.sum(1))
    if len(present) == 0:
        return None
    spread_E = shares.share_DE[present].max(0) - shares.share_DE[present].min(0)
    kept = np.sort(np.argsort(-spread_E, kind="stable")[:MOST_BARS])
    known_D = shares.high_DE.min(1) < 1
    strips = [
        Strip(
            names[domain],
            shares.share_DE[domain, kept].tolist(),
            shares.chance,
            shares.low_DE[domain, kept].tolist() if known_D[domain] else None,
            shares.high_DE[domain, kept].tolist() if known_D[domain] else None,
        )
        for domain in present
    ]
    label = shares.point.label
    heading = f"Domains use the same experts in layer {label}"
    if shares.strongest and (apart(shares) or contrast(shares) > shares.chance):
        name, expert, share = shares.strongest
        least = min(present, key=lambda domain: float(shares.share_DE[domain, expert]))
        fewer = percent(float(shares.share_DE[least, expert]))
        heading = f"Layer {label}: expert {expert} serves {percent(share)} of {name} and {fewer} of {names[least]}"
    caption = "Share of the domain's tokens that use the expert; whiskers: 95%, over documents; dashed: even use."
    if len(kept) < len(spread_E):
        caption += f" The {len(kept)} experts of {len(spread_E)} that differ most."
    told = "; ".join(f"{strip.series}: most expert {kept[int(np.argmax(strip.values))]}" for strip in strips)
    svg = columns(
        heading,
        f"{told}. Chance {percent(shares.chance)}.",
        strips,
        [str(e) for e in kept],
        ("expert", "share of tokens"),
    )
    return Figure(heading, svg, caption, f"{stream.name}-domains-layer-{label}")


def pairs_map(stream: Stream, both: Coactivation) -> Figure | None:
    """How often the experts of the strongest pairs go together; None if no two do."""
    if not both.strongest or not both.chance:
        return None
    most_E = np.nan_to_num(both.together_EE).max(1)
    order = list(dict.fromkeys(expert for one, other, _ in both.strongest for expert in (one, other)))
    order += [int(expert) for expert in np.argsort(-most_E, kind="stable") if expert not in order]
    kept = sorted(order[:STRONGEST])
    share_CC = np.nan_to_num(both.together_EE[np.ix_(kept, kept)])
    ceiling = max(float(share_CC.max()), 2 * both.chance)
    edges = np.linspace(0, ceiling, len(SEQUENTIAL) + 1)[1:-1]
    shades = [
        Shade(colour, f"to {percent(edge)}")
        for colour, edge in zip(SEQUENTIAL, [*edges.tolist(), ceiling], strict=True)
    ]
    one, other, share = both.strongest[0]
    least = "at least " if share < 1 else ""
    heading = (
        f"Layer {both.point.label}: experts {one} and {other} go together in {least}{percent(share)} of their tokens"
    )
    names = [str(expert) for expert in kept]
    svg = heat(
        heading,
        f"{len(kept)} experts of the strongest pairs; chance {percent(both.chance)}.",
        np.searchsorted(edges, share_CC).tolist(),
        shades,
        names,
        names,
        ("also uses expert", "uses"),
        square=True,
    )
    caption = (
        f"Of the tokens of the expert on the left, the share that uses the other too; by chance {percent(both.chance)}."
    )
    return Figure(heading, svg, caption, f"{stream.name}-pairs-layer-{both.point.label}")


def flow_ribbons(stream: Stream, step: Flow) -> Figure | None:
    """First choices of a layer and of the next; None if no token has both."""
    total = step.count_EE.sum()
    if not total:
        return None
    from_E, to_E = step.count_EE.sum(1), step.count_EE.sum(0)
    strongest = np.argsort(np.outer(from_E, to_E) / total - step.count_EE, axis=None, kind="stable")[:FLOWS]
    sources, targets = np.unravel_index(strongest, step.count_EE.shape)
    left, right = _kept(sources, len(from_E)), _kept(targets, len(to_E))
    grouped = _grouped(_grouped(step.count_EE, left).T, right).T
    caption = "Tokens by their first choices in the two layers."
    if len(left) < len(from_E) or len(right) < len(to_E):
        caption = f"First choices: the experts of the {FLOWS} flows that exceed independent layers the most."
        caption += " Others are pooled, grey; what flows between those is left out."
        grouped[len(left) :, len(right) :] = 0
    heading = f"Layer {step.source.label} tells {percent(max(step.value, 0.0))} of the first choice in the next"
    svg = ribbons(
        heading,
        f"First choices of {total:,} tokens; 0% would be independent layers.",
        _flowing(left, from_E / total),
        _flowing(right, to_E / total),
        grouped.tolist(),
        (f"layer {step.source.label}", f"layer {step.target.label}"),
    )
    return Figure(heading, svg, caption, f"{stream.name}-flow-layer-{step.source.label}")


def _flowing(kept: list[int], share_E: np.ndarray) -> list[str]:
    named = [f"expert {expert} · {percent(float(share_E[expert]))}" for expert in kept]
    return named + [OTHERS] * (len(kept) < len(share_E))


def _kept(numbers: np.ndarray, experts: int) -> list[int]:
    """Those numbers, or all if there are few experts."""
    return list(range(experts)) if experts <= FLOWS else sorted({int(number) for number in numbers})


def _grouped(count_EX: np.ndarray, kept: list[int]) -> np.ndarray:
    if len(kept) == len(count_EX):
        return count_EX
    return np.vstack([count_EX[kept], count_EX.sum(0) - count_EX[kept].sum(0)])


def _load_level(ratio: float) -> int:
    return len(LOADS) - 1 if ratio == 0 else int(np.searchsorted(RATIOS, ratio))


def _pooled(ratio_E: np.ndarray, each: int) -> np.ndarray:
    starts = np.arange(0, len(ratio_E), each)
    return np.asarray(np.add.reduceat(ratio_E, starts) / np.diff(np.append(starts, len(ratio_E))))


def _told(series: Line, places: Sequence[str]) -> str:
    known = [(value, place) for value, place in zip(series.values, places, strict=True) if value is not None]
    if not known:
        return f"{series.series}: not known"
    low, high = min(known), max(known)
    return f"{series.series}: from {low[0]:.3g} (layer {low[1]}) to {high[0]:.3g} (layer {high[1]})"


def _at_least_0(value: object) -> float | None:
    """Less than chance is drawn as 0, where the axis starts; the table has the number."""
    known = _float(value)
    return None if known is None else max(known, 0.0)


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
