"""What is dropped at a capacity, of whom, and what is padded where there is room.

Whose tokens share the places matters as much as how many there are: the smaller a group, the more chance drops.
Legend: T tokens, K choices, G groups of tokens that share places, B buckets (experts or devices), F factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moectl.report.output import Cell
from moectl.routing.whatif.asked import mean, require, weights, with_mean
from moectl.routing.whatif.chance import choices, overflow
from moectl.routing.whatif.conventions import CONVENTIONS, WEIGHED, Queued, kept, queued, room
from moectl.routing.whatif.conventions import Options as Options
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.queues import Groups, groups
from moectl.text import shown
from moectl.traces.trace import RoutingTrace

FACTORS = (0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
FEW = 0.01
"""Of drops; Switch Transformers (arXiv 2101.03961) has under 1% typically (section 2.2)."""


def run(trace: RoutingTrace, options: Options) -> Finding:
    """How much is dropped, of whom, and what is padded.

    Raises:
        InputError: as `queued`.
    """
    unscored = options.convention == "v-moe" and any(routed.score_TE is None for routed in trace.layers)
    require(trace, "capacity", "weights" if unscored or options.convention in WEIGHED else "index")
    of = groups(trace.tokens, options.group_tokens)
    tenth_T = of.within_T * 10 // of.size_G[of.group_T]
    curve_x = _curve_x(trace, of, options)
    rows: list[tuple[Cell, ...]] = []
    curves, tenths, domains = [], [], []
    for routed in trace.layers:
        queue = queued(routed, of, options)
        wanted_TK, kept_TK = queue.bucket_TK >= 0, kept(queue, of, options)
        wanted_T, lost_T = wanted_TK.sum(1), (wanted_TK & ~kept_TK).sum(1)
        weight_lost = None
        if routed.weight_TK is not None:
            weight_TK = weights(routed)
            weight_lost = float(weight_TK[wanted_TK & ~kept_TK].sum() / max(weight_TK[wanted_TK].sum(), 1e-30))
        dropped, padded = _at(queue, of, options, options.asked)
        chance = _chance(queue, of, options, options.asked)
        enough = _enough(queue, of, options)
        alone = float(((wanted_T > 0) & (lost_T == wanted_T)).mean())
        rows.append((routed.point.label, dropped, chance, alone, weight_lost, padded, enough))
        curves.append([(*_at(queue, of, options, at), _chance(queue, of, options, at)) for at in curve_x])
        tenths.append(_shares(lost_T, wanted_T, tenth_T, 10))
        domains.append(_shares(lost_T, wanted_T, trace.tokens.domain_T, len(trace.tokens.domains)))
    unit = "factor" if options.convention != "hf-switch" else "places"
    columns = ("layer", "dropped", "by chance", "tokens left out", "weight lost", "padding", f"{unit} for under 1%")
    by_domain = {
        name: mean(column) for name, column in zip(trace.tokens.domains, zip(*domains, strict=True), strict=True)
    }
    return Finding(
        "capacity",
        _headline(rows, by_domain, options, unit),
        columns,
        (*with_mean(rows), *_domain_rows(by_domain)),
        _curves(curve_x, np.array(curves), tenths, unit, options),
        _assumptions(trace, options, unit),
        {
            "domains": by_domain,
            "tenths": [mean(column) for column in zip(*tenths, strict=True)],
            "layers": {row[0]: [at[0] for at in layer] for row, layer in zip(rows, curves, strict=True)},
            "x": list(curve_x),
        },
    )


def _domain_rows(by_domain: Mapping[str, float | None]) -> list[tuple[Cell, ...]]:
    there = {name: share for name, share in by_domain.items() if share is not None}
    return [(f"domain {shown(name, 40)}", share, *[None] * 5) for name, share in there.items() if len(there) > 1]


def _at(queue: Queued, of: Groups, options: Options, at: float) -> tuple[float, float]:
    """Shares of the assignments that are dropped and of the places that are padded; from the queues' lengths alone."""
    room_G1 = room(queue, of, options, at)[:, None]
    kept_sum, all_places = int(np.minimum(queue.count_GB, room_G1).sum()), int(room_G1.sum()) * len(queue.size_B)
    wanted = int(queue.count_GB.sum())
    return (wanted - kept_sum) / max(wanted, 1), (all_places - kept_sum) / max(all_places, 1)


def _chance(queue: Queued, of: Groups, options: Options, at: float) -> float:
    """The share of dropped assignments if all choices were drawn by a fair lot."""
    experts, share_J = int(queue.size_B.sum()), choices(queue.bucket_TK)
    room_G = room(queue, of, options, at)
    alike, number = np.unique(np.stack([of.size_G, room_G]), axis=1, return_counts=True)
    sizes, buckets = np.unique(queue.size_B, return_counts=True)
    over = sum(
        float(times * many) * overflow(experts, int(size), share_J, int(tokens), int(places_))
        for (tokens, places_), times in zip(alike.T, number, strict=True)
        for size, many in zip(sizes, buckets, strict=True)
    )
    return over / max(int(queue.count_GB.sum()), 1)


def _enough(queue: Queued, of: Groups, options: Options) -> float:
    """The smallest factor, to hundredths, or number of places, with under 1% dropped."""
    step = 1 if options.convention == "hf-switch" else 100

    def too_few(steps: int) -> bool:
        return _at(queue, of, options, steps / step)[0] >= FEW

    low, high = 0, step
    while too_few(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_few(middle) else (low, middle)
    return high / step


def _shares(part_T: np.ndarray, of_T: np.ndarray, label_T: np.ndarray, labels: int) -> list[float | None]:
    """What part of the sums over the tokens of each label; None where there are none."""
    part_X, of_X = (np.bincount(label_T, value_T, labels) for value_T in (part_T, of_T))
    return [float(part / all_) if all_ else None for part, all_ in zip(part_X, of_X, strict=True)]


def _curve_x(trace: RoutingTrace, of: Groups, options: Options) -> tuple[float, ...]:
    if options.convention != "hf-switch":
        return FACTORS
    most = int(of.size_G.max()) * max(routed.point.top_k for routed in trace.layers)
    return tuple(float(1 << power) for power in range(most.bit_length() + 1))


def _curves(
    curve_x: tuple[float, ...], curve_LF3: np.ndarray, tenths: list[Any], unit: str, options: Options
) -> tuple[Curve, ...]:
    middle_F3, worst_F = curve_LF3.mean(0), curve_LF3[..., 0].max(0)
    lines = {
        "dropped": middle_F3[:, 0].tolist(),
        "dropped in the worst layer": worst_F.tolist(),
        "dropped by chance": middle_F3[:, 2].tolist(),
        "padding": middle_F3[:, 1].tolist(),
    }
    x_label = "capacity factor" if unit == "factor" else "places per expert and sequence"
    at = f"{x_label} {options.asked:g}"
    tenth = [mean(column) for column in zip(*tenths, strict=True)]
    return (
        Curve("Dropped and padded", x_label, "share", curve_x, lines, chance="dropped by chance", percent=True),
        Curve(
            f"Who is dropped, at {at}",
            "tenth of the group's tokens, the first ones first",
            "share dropped",
            tuple(range(1, 11)),
            {"dropped": tenth},
            percent=True,
        ),
    )


def _headline(rows: list[tuple[Cell, ...]], by_domain: Mapping[str, float | None], options: Options, unit: str) -> str:
    column = [[cell for cell in each if isinstance(cell, int | float)] for each in zip(*rows, strict=True)]
    what = f"a capacity factor of {options.factor:g}" if unit == "factor" else f"{options.expert_capacity} places"
    text = (
        f"At {what} ({options.convention}), {np.mean(column[1]):.1%} of the assignments are dropped (random routing: "
        f"{np.mean(column[2]):.1%}), and {np.mean(column[3]):.1%} of the tokens lose every expert. Under 1% "
        f"in every layer takes {max(column[6]):g}{' times an even share' if unit == 'factor' else ' places'}"
    )
    there = {name: share for name, share in by_domain.items() if share is not None}
    if len(there) > 1:
        most, least = max(there, key=lambda name: there[name]), min(there, key=lambda name: there[name])
    if len(there) > 1 and there[most] > there[least]:
        text += f"; {shown(most, 40)} loses {there[most]:.1%}, {shown(least, 40)} {there[least]:.1%}"
    return text + "."


def _assumptions(trace: RoutingTrace, options: Options, unit: str) -> tuple[str, ...]:
    whose = {
        "batch": f"{options.batch_tokens} tokens in the order of the trace share the places.",
        "rank": f"Each of {options.gpus} ranks has its part of {options.batch_tokens} tokens and its own places.",
        "sequence": "The tokens of a document, read at once, share the places.",
    }["sequence" if unit == "places" else options.group]
    said = [
        f"{options.convention}: {CONVENTIONS[options.convention]}.",
        whose,
        "Chance: every token draws its experts by a fair lot (closed form), in the same groups.",
        "The layers after a drop would have seen other hidden states, and might have chosen otherwise.",
    ]
    if any((routed.index_TK < 0).any() for routed in trace.layers):
        said.append("What was dropped already when the trace was captured, or chose no expert, is not counted again.")
    if options.convention == "v-moe" and trace.layers[0].score_TE is None:
        said.append("Without scores the highest combine weight stands for the highest probability.")
    if options.convention == "gshard":
        said.append("A second choice that is not sent is no drop.")
    return tuple(said)
