"""What Rectify-Router (arXiv 2402.12399) would save of what a capacity drops, and fill of what it pads.

Intra-GPU rectification sends a dropped assignment to the expert with the highest score on the GPU that its token is
on, over that expert's capacity if need be: no byte travels for it. Fill-in rectification gives places that stay empty
to the tokens for which the expert comes next after the chosen ones, the highest scores first.
From the paper's abstract and figure 2; that several further choices are filled, one after the other, goes beyond them.
Legend: T tokens, K choices, E experts, p probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moectl.report.output import Cell
from moectl.routers.capacity import capacity as places_of
from moectl.routing.whatif.asked import computing, homes, require, require_numbers, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.queues import Groups, by_rank, places
from moectl.traces.statistics import probabilities
from moectl.traces.trace import Routed, RoutingTrace, Tokens

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
CURVE_BATCHES = 2
"""Of every layer, for the curve: each factor takes as long as the answer itself."""

CHANCE_TOKENS = 8192
"""Of every layer, for what chance gives."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        factor: places per expert, as a multiple of what perfect balance needs.
        batch_tokens: tokens of a batch, spread over the GPUs in equal parts, as data parallelism does.
        gpus: that the batch and the experts are spread over.
        fill: how many choices beyond the model's own are offered empty places; 0: none.
        seed: of the random routing to compare with.
    """

    factor: float = 1.25
    batch_tokens: int = 4096
    gpus: int = 8
    fill: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "fill")


@dataclass(frozen=True, slots=True)
class Rectified:
    """Sums over tokens. Those of the same routing add up.

    Attributes:
        wanted_D: assignments that the router made, of each domain.
        dropped_D: of them, those over capacity.
        rescued_D: of those, how many an expert on the token's GPU took.
        places: at all experts.
        filled: empty ones that were given away.
        mass: of probability at the experts that the router chose.
        mass_kept: at those of them that had a place.
        mass_after: at all that computed something in the end.
    """

    wanted_D: np.ndarray
    dropped_D: np.ndarray
    rescued_D: np.ndarray
    places: int
    filled: int
    mass: float
    mass_kept: float
    mass_after: float

    def __add__(self, other: Rectified) -> Rectified:
        return Rectified(*(getattr(self, name) + getattr(other, name) for name in Rectified.__slots__))

    def shares(self) -> tuple[float, float, float, float, float, float, float]:
        """Dropped before and after, padding before and after, extra rows per place, mass kept before and after."""
        wanted, dropped, rescued = (int(sums_D.sum()) for sums_D in (self.wanted_D, self.dropped_D, self.rescued_D))
        used, all_places = wanted - dropped, max(self.places, 1)
        return (
            dropped / max(wanted, 1),
            (dropped - rescued) / max(wanted, 1),
            1 - used / all_places,
            1 - (used + self.filled) / all_places,
            rescued / all_places,
            self.mass_kept / self.mass if self.mass else 0.0,
            self.mass_after / self.mass if self.mass else 0.0,
        )


def rectified(
    index_TK: np.ndarray, p_TE: np.ndarray, domain_T: np.ndarray, domains: int, room: int, gpus: int, fill: int
) -> Rectified:
    """One batch, with `room` places at every expert.

    The first choices of all tokens get their places first. An expert takes a token once.
    """
    T, K = index_TK.shape
    experts = p_TE.shape[1]
    batch = Groups(np.array([0, T]), np.zeros(T, np.int64))
    place_TK, count_GE = places(index_TK, by_rank(batch, K), batch, experts)
    wanted_TK = index_TK >= 0
    kept_TK = wanted_TK & (place_TK < room)
    chosen_TE, used_TE = (_marked(index_TK, mask_TK, experts) for mask_TK in (wanted_TK, kept_TK))
    mass, mass_kept = float(p_TE[chosen_TE].sum()), float(p_TE[used_TE].sum())

    here_TE = homes(experts, gpus) == (np.arange(T) * gpus // T)[:, None]
    rescued_T = np.zeros(T, np.int64)
    for rank in range(K):
        row_R = np.flatnonzero(wanted_TK[:, rank] & ~kept_TK[:, rank])
        p_RE = np.where(here_TE[row_R] & ~used_TE[row_R], p_TE[row_R], -1.0)
        best_R = p_RE.argmax(1)
        found_R = p_RE[np.arange(len(row_R)), best_R] >= 0
        used_TE[row_R[found_R], best_R[found_R]] = True
        rescued_T[row_R[found_R]] += 1

    free_E = room - np.minimum(count_GE[0], room)
    filled, left_TE = 0, np.where(chosen_TE, -1.0, p_TE)
    for _ in range(min(fill, experts - K)):
        next_T = left_TE.argmax(1)
        p_T = left_TE[np.arange(T), next_T]
        left_TE[np.arange(T), next_T] = -1.0
        asks_T = (p_T >= 0) & ~used_TE[np.arange(T), next_T]
        order_R = np.lexsort((-p_T, next_T))
        order_R = order_R[asks_T[order_R]]
        first_E = np.searchsorted(next_T[order_R], np.arange(experts))
        taken_R = order_R[np.arange(len(order_R)) - first_E[next_T[order_R]] < free_E[next_T[order_R]]]
        used_TE[taken_R, next_T[taken_R]] = True
        free_E -= np.bincount(next_T[taken_R], minlength=experts)
        filled += len(taken_R)
    wanted_D, dropped_D, rescued_D = (
        np.bincount(domain_T, value_T, domains)
        for value_T in (wanted_TK.sum(1), (wanted_TK & ~kept_TK).sum(1), rescued_T)
    )
    mass_after = float(p_TE[used_TE].sum())
    return Rectified(wanted_D, dropped_D, rescued_D, room * experts, filled, mass, mass_kept, mass_after)


def _marked(index_TK: np.ndarray, mask_TK: np.ndarray, experts: int) -> np.ndarray:
    marked_TE = np.zeros((len(index_TK), experts), bool)
    marked_TE[np.nonzero(mask_TK)[0], index_TK[mask_TK]] = True
    return marked_TE


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Drops and padding before and after.

    Raises:
        InputError: there are no scores.
    """
    require(trace, "rectify", "scores")
    rows: list[tuple[Cell, ...]] = []
    layers = []
    few = max(1, CHANCE_TOKENS // options.batch_tokens)
    for routed in trace.layers:
        layers.append(layer_sums(routed, trace.tokens, options))
        dealt = layer_sums(routed, trace.tokens, options, few, np.random.default_rng(options.seed))
        share, chance = layers[-1].shares(), dealt.shares()
        rows.append((routed.point.label, share[0], share[1], chance[0], chance[1], *share[2:]))
    columns = (
        *("layer", "dropped", "dropped after", "by chance", "by chance after", "padding", "padding after"),
        *("extra rows", "scores kept", "scores kept after"),
    )
    total = with_mean(rows)[-1]
    headline = (
        f"At a capacity factor of {options.factor:g}, {total[1]:.1%} of the assignments are dropped; Rectify-Router "
        f"leaves {total[2]:.1%} (random routing: {total[3]:.1%} and {total[4]:.1%}), for {total[7]:.1%} more rows than "
        f"there are places. It fills padding from {total[5]:.1%} down to {total[6]:.1%}, and the experts that run have "
        f"{total[9]:.1%} of the scores of the model's choices in place of {total[8]:.1%}."
    )
    return Finding(
        "rectify",
        headline,
        columns,
        with_mean(rows),
        (_curve(trace, options),),
        (
            (
                f"Batches of {options.batch_tokens} tokens on {options.gpus} GPUs (at most one per expert), "
                "neighbouring experts on each; ceil(factor k T / E) places, earlier tokens first."
            ),
            "Chance: the scores of the first tokens, dealt to the experts at random token by token, with a seed.",
            (
                "The paper reports 4.7% better accuracy than the plain top-1 router (abstract of arXiv 2402.12399); a "
                "trace says nothing of accuracy."
            ),
        ),
        {"domains": _domains(trace.tokens.domains, layers)},
    )


def _domains(names: Sequence[str], layers: Sequence[Rectified]) -> dict[str, dict[str, float]]:
    """Shares dropped, before and after, over all layers."""
    sums = [sum(getattr(each, name) for each in layers).tolist() for name in ("wanted_D", "dropped_D", "rescued_D")]
    return {
        name: {"dropped": dropped / wanted, "dropped after": (dropped - rescued) / wanted}
        for name, wanted, dropped, rescued in zip(names, *sums, strict=True)
        if wanted
    }


def layer_sums(
    routed: Routed,
    tokens: Tokens,
    options: Options,
    limit: int | None = None,
    generator: np.random.Generator | None = None,
) -> Rectified:
    """One layer, over its batches, at most the first `limit`; given a generator, with scores dealt at random."""
    starts = range(0, len(routed.index_TK), options.batch_tokens)[:limit]
    nobody_D = np.zeros(len(tokens.domains))
    parts = (_batch(routed, tokens, start, options, generator) for start in starts)
    return sum(parts, Rectified(nobody_D, nobody_D, nobody_D, 0, 0, 0.0, 0.0, 0.0))


def _batch(
    routed: Routed, tokens: Tokens, start: int, options: Options, generator: np.random.Generator | None
) -> Rectified:
    assert routed.score_TE is not None
    index_TK, experts = computing(routed)
    at = slice(start, start + options.batch_tokens)
    p_TE, index_TK = probabilities(routed.point, routed.score_TE[at])[:, :experts], index_TK[at]
    if generator is not None:
        p_TE = generator.permuted(p_TE, axis=1)
        index_TK = np.argsort(-p_TE, axis=1)[:, : routed.point.top_k]
    room = places_of(len(index_TK), experts, routed.point.top_k, options.factor)
    domain_T, domains = tokens.domain_N[tokens.document_T[at]], len(tokens.domains)
    return rectified(index_TK, p_TE, domain_T, domains, room, min(options.gpus, experts), options.fill)


def _curve(trace: RoutingTrace, options: Options) -> Curve:
    means = []
    for factor in FACTORS:
        at = replace(options, factor=factor)
        means.append(
            np.mean([layer_sums(routed, trace.tokens, at, CURVE_BATCHES).shares() for routed in trace.layers], axis=0)
        )
    names = ("dropped", "dropped after", "padding", "padding after")
    lines = {name: [float(share[column]) for share in means] for column, name in enumerate(names)}
    title = f"Dropped and padded, before and after, in the first {CURVE_BATCHES} batches"
    return Curve(title, "capacity factor", "share", FACTORS, lines, percent=True)
