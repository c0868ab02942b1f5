"""How often is the next layer's expert guessed, so that it can be fetched while this layer computes?

Legend: T tokens, K experts per token, E experts, L layers, D domains, M stored matrices, C experts that are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moectl.errors import InputError
from moectl.report.output import Cell
from moectl.routing.placement.loads import halves
from moectl.routing.whatif.asked import computing, computing_experts, require, require_numbers, require_share, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.guessing import lengths, markov, nearest, order, popular
from moectl.traces.trace import NO_EXPERT, RoutingTrace

CHANCE, POPULAR, MARKOV, NEAREST = "random", "popularity", "Markov", "MoE-Infinity"


@dataclass(frozen=True, slots=True)
class Options:
    """What is guessed.

    Attributes:
        fetched: how many experts are fetched ahead for a layer; as many as a token takes, if 0.
        target: a share of the experts, of which the fewest to be fetched for it are found.
        matrices: how many documents' matrices MoE-Infinity's guess compares with.
    """

    fetched: int = 0
    target: float = 0.9
    matrices: int = 64

    def __post_init__(self) -> None:
        require_numbers(self, "fetched", "target")
        require_share(self, "target")


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Guess the experts of every layer but the first, counted on one half of the documents and judged on the other.

    Raises:
        InputError: the trace has fewer than two layers or tokens.
    """
    require(trace, "prefetch")
    fit_T = halves(trace.tokens) == 0
    if len(trace.layers) < 2 or fit_T.all():
        raise InputError(
            f"The trace has {len(trace)} tokens at {len(trace.layers)} layers.",
            "A guess goes from one layer to the next, and is judged on other tokens than it was counted on.",
            "Capture more: moectl analyze-routing MODEL --data FILE --trace DIR.",
        )
    places = _places(trace, fit_T, options.matrices)
    layers = trace.layers[1:]
    fetched = [options.fetched or min(routed.point.top_k, computing_experts(routed)) for routed in layers]
    recall_LC = {name: _recall(place_LDE.sum(1)) for name, place_LDE in places.items()}
    asked_L = places[POPULAR].sum((1, 2))
    held_C = np.arange(places[POPULAR].shape[2] + 1)
    experts_L = np.array([computing_experts(routed) for routed in layers])
    recall_LC = {CHANCE: np.minimum(held_C / experts_L[:, None], 1)} | recall_LC
    mean_C = {name: asked_L @ each / max(asked_L.sum(), 1) for name, each in recall_LC.items()}
    rows: list[tuple[Cell, ...]] = []
    for layer, (routed, ahead) in enumerate(zip(layers, fetched, strict=True)):
        at = min(ahead, len(held_C) - 1)
        least = _needed(recall_LC[MARKOV][layer], options.target)
        rows.append((routed.point.label, ahead, *(float(each[layer, at]) for each in recall_LC.values()), least))
    needed = {name: _needed(each, options.target) for name, each in mean_C.items()}
    domains = {
        name: {
            guess: _recall(place_LDE[:, at].sum(0))[min(max(fetched), len(held_C) - 1)].item()
            for guess, place_LDE in places.items()
        }
        for at, name in enumerate(trace.tokens.domains)
        if places[POPULAR][:, at].any()
    }
    *table, mean = with_mean(rows)
    table.append((*mean[:-1], needed[MARKOV]))  # of all layers together, as in the curve
    return Finding(
        "prefetch",
        _headline(table[-1], options.target),
        ("layer", "fetched", *recall_LC, f"fetched for {options.target:.0%} by {MARKOV}"),
        tuple(table),
        (_curve(mean_C),),
        (
            "Popularity, P(next | this) and matrices are counted on one half of the documents and judged on the other.",
            "Markov: experts by the mean of P(next | this) over the token's experts at this layer.",
            f"MoE-Infinity: the next row of the nearest of {options.matrices} matrices at most (arXiv 2401.14361).",
            "MoE-Infinity's released code compares the layers to come, this the layers gone through.",
            "What the next gate says of this layer's hidden states (arXiv 2312.17238) is not asked: a trace has none.",
            "Whether there is time to fetch before the layer is reached is not asked.",
        ),
        {
            "experts_for_target": needed,
            "recall": {name: each.tolist() for name, each in mean_C.items()},
            "domains": domains,
        },
    )


def _places(trace: RoutingTrace, fit_T: np.ndarray, matrices: int) -> dict[str, np.ndarray]:
    """How often each guess had what came at each place, at all layers but the first [L - 1, D, E]."""
    tokens, domains = trace.tokens, len(trace.tokens.domains)
    domain_T = tokens.domain_T.astype(np.int64)
    experts = max(map(computing_experts, trace.layers))
    names = (POPULAR, MARKOV, NEAREST)
    places = {name: np.zeros((len(trace.layers) - 1, domains, experts), np.int64) for name in names}
    order_LE = np.zeros((len(trace.layers), experts), np.int64)
    before_TK = np.empty(0)
    for layer, routed in enumerate(trace.layers):
        index_TK, own = computing(routed)
        counted = index_TK[fit_T]
        count_E = np.bincount(counted[counted >= 0], minlength=own)
        order_LE[layer] = order(np.pad(count_E, (0, experts - own), constant_values=-1))
        if layer:
            judged = (index_TK[~fit_T], count_E, domain_T[~fit_T], domains)
            places[POPULAR][layer - 1, :, :own] = popular(*judged)
            earlier = computing_experts(trace.layers[layer - 1])
            chained = markov(before_TK, index_TK, fit_T, count_E, earlier, domain_T, domains)
            places[MARKOV][layer - 1, :, :own] = chained
        before_TK = index_TK
    count_LEM = _matrices(trace, fit_T, matrices, experts)
    inverse_LM = lengths(count_LEM)
    place_DLE = np.zeros((domains, len(trace.layers), experts), np.int64)
    for first, last in _documents(tokens.document_T, ~fit_T):
        index_LTK = _stacked(trace, slice(first, last))
        nearest(index_LTK, count_LEM, inverse_LM, order_LE, place_DLE[domain_T[first]])
    places[NEAREST] += place_DLE[:, 1:].transpose(1, 0, 2)
    return places


def _documents(document_T: np.ndarray, mask_T: np.ndarray) -> list[tuple[int, int]]:
    """From where to where the documents go that a mask keeps; of a document that it cuts, the part that it keeps."""
    part_T = document_T * 2 + mask_T
    edge = np.concatenate([[0], np.flatnonzero(np.diff(part_T)) + 1, [len(part_T)]])
    return [(int(first), int(last)) for first, last in pairwise(edge) if mask_T[first]]


def _stacked(trace: RoutingTrace, at: slice) -> np.ndarray:
    """The experts of some tokens at all layers [L, T, K]."""
    most = max(routed.point.top_k for routed in trace.layers)
    index_LTK = np.full((len(trace.layers), at.stop - at.start, most), NO_EXPERT, np.int32)
    for layer, routed in enumerate(trace.layers):
        index_TK = routed.index_TK[at]
        fits = index_TK < computing_experts(routed)
        index_LTK[layer, :, : routed.point.top_k] = np.where(fits, index_TK, NO_EXPERT)
    return index_LTK


def _matrices(trace: RoutingTrace, fit_T: np.ndarray, matrices: int, experts: int) -> np.ndarray:
    """What documents, evenly spaced over those that are counted on, took of each layer [L, E, M], float32."""
    documents = _documents(trace.tokens.document_T, fit_T)
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(matrices, len(documents))).round().astype(int))
    count_LEM = np.zeros((len(trace.layers), experts, len(chosen)), np.float32)
    for at, number in enumerate(chosen):
        for layer, index_TK in enumerate(_stacked(trace, slice(*documents[number]))):
            count_LEM[layer, :, at] = np.bincount(index_TK[index_TK >= 0], minlength=experts)
    return count_LEM


def _recall(place_E: np.ndarray) -> np.ndarray:
    """Of all that came, the share at the first 0, 1, ... E places [..., E + 1]."""
    before = np.zeros((*place_E.shape[:-1], 1))
    return np.concatenate([before, np.cumsum(place_E, axis=-1)], axis=-1) / np.maximum(
        place_E.sum(-1, keepdims=True), 1
    )


def _needed(recall_C: np.ndarray, target: float) -> int | None:
    enough = np.flatnonzero(recall_C >= target)
    return int(enough[0]) if len(enough) else None


def _headline(mean: tuple[Cell, ...], target: float) -> str:
    _, fetched, chance, popularity, chained, near, least = mean
    ahead = "one expert" if fetched == 1 else f"{fetched:g} experts"
    return (
        f"Fetching {ahead} ahead of a layer gets {chained:.1%} of those it will take, by P(next | this); "
        f"popularity gets {popularity:.1%}, MoE-Infinity's nearest matrix {near:.1%}, random ones {chance:.1%}. "
        f"{'No number gets' if least is None else f'It takes {least} to get'} {target:.0%}."
    )


def _curve(mean_C: Mapping[str, np.ndarray]) -> Curve:
    fetched = np.unique(np.linspace(1, len(mean_C[CHANCE]) - 1, 64).round().astype(int))
    lines = {name: each[fetched].tolist() for name, each in mean_C.items()}
    title = "How much of the next layer is there in time"
    return Curve(title, "experts fetched ahead", "share", fetched.tolist(), lines, CHANCE, percent=True)
