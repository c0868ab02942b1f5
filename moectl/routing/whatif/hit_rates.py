"""What a trace asks of caches in each layer or of one over all, what it finds there, and what random routing finds.

Legend: T tokens, K experts per token, E experts, L layers, D domains, C experts that a cache holds of a layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moectl.routing.placement.loads import halves
from moectl.routing.whatif.asked import computing, computing_experts
from moectl.routing.whatif.chance import Shares, choices, inside
from moectl.routing.whatif.eviction import BELADY, Requests, asked, hits
from moectl.traces.trace import Routed, RoutingTrace

DRAWN = 1 << 20
"""How many numbers a layer of random routing is drawn from."""

MOST_STEPS = 1 << 14
"""Tokens after which a cache that is not full is taken as filling no more."""


def layer_requests(trace: RoutingTrace, routed: Routed, empty: bool = False) -> Requests:
    """The steps of one layer, a token each, counted under their domains."""
    key_TK, experts = computing(routed)
    tokens = trace.tokens
    start_T = np.append(True, np.diff(tokens.document_T) != 0)
    layer_C, domain_T = np.zeros(experts, np.int64), tokens.domain_T.astype(np.int64)
    return Requests(key_TK.astype(np.int32), layer_C, start_T, domain_T, len(tokens.domains), empty)


def all_requests(trace: RoutingTrace, empty: bool = False) -> Requests:
    """The steps of the layers in turn, token after token, counted under their layers and, in those, their domains."""
    layers, domains = len(trace.layers), len(trace.tokens.domains)
    parts = [layer_requests(trace, routed) for routed in trace.layers]
    key_TLK = np.full((len(trace), layers, max(part.key_NK.shape[1] for part in parts)), -1, np.int32)
    first = 0
    for layer, part in enumerate(parts):
        key_TLK[:, layer, : part.key_NK.shape[1]] = np.where(part.key_NK >= 0, part.key_NK + first, -1)
        first += len(part.layer_C)
    layer_C = np.repeat(np.arange(layers), [len(part.layer_C) for part in parts])
    start_TL = np.zeros((len(trace), layers), bool)
    start_TL[:, 0] = parts[0].start_N
    group_N = (np.arange(layers) * domains + parts[0].group_N[:, None]).ravel()
    key_NK = key_TLK.reshape(-1, key_TLK.shape[2])
    return Requests(key_NK, layer_C, start_TL.ravel(), group_N, layers * domains, empty)


def requested(trace: RoutingTrace) -> np.ndarray:
    """How many requests each layer has from each domain [L, D]."""
    return np.stack([asked(layer_requests(trace, routed)) for routed in trace.layers])


def found(trace: RoutingTrace, policy: str, *, one: bool, empty: bool) -> np.ndarray:
    """How many of them find their expert where 0, 1, ... C experts of a layer are held [L, D, C + 1].

    Args:
        policy: of `eviction`.
        one: whether one cache holds as many over all layers.
        empty: whether every document finds the caches empty.
    """
    size_C = np.arange(max(map(computing_experts, trace.layers)) + 1)
    if one:
        requests = all_requests(trace, empty)
        held_C = np.minimum(size_C * requests.layers, len(requests.layer_C))
        return hits(requests, policy)[:, held_C].reshape(requests.layers, -1, len(size_C))
    each = [hits(layer_requests(trace, routed, empty), policy) for routed in trace.layers]
    return np.stack([hits_DC[:, np.minimum(size_C, hits_DC.shape[1] - 1)] for hits_DC in each])


def static_rate(trace: RoutingTrace, *, one: bool) -> np.ndarray | None:
    """The hit rate of the busiest 0, 1, ... C experts of one half of the documents, on the other half [C + 1].

    Returns:
        None if one half has no requests.
    """
    fit_T = halves(trace.tokens) == 0
    counts = []
    for routed in trace.layers:
        key_TK, experts = computing(routed)
        halved = (key_TK[fit_T], key_TK[~fit_T])
        counts.append(np.stack([np.bincount(each[each >= 0], minlength=experts) for each in halved]))
    together = np.concatenate(counts, axis=1)
    fitted, judged = together.sum(1)
    if not fitted or not judged:
        return None
    size_C = np.arange(max(each.shape[1] for each in counts) + 1)
    served_C = np.zeros(len(size_C), np.int64)
    for fit_E, judged_E in [together] if one else counts:
        served_E = np.append(0, np.cumsum(judged_E[np.argsort(-fit_E, kind="stable")]))
        served_C += served_E[np.minimum(size_C * (len(counts) if one else 1), len(judged_E))]
    return served_C / judged


def chance(
    trace: RoutingTrace, policy: str, requests_L: np.ndarray, *, one: bool, empty: bool, seed: int
) -> np.ndarray:
    """The hit rate of a policy [C + 1] if every token drew its experts by a fair lot.

    In a cache of a layer all policies but Belady's find as much, `filling`. All else is simulated.

    Args:
        requests_L: of each layer of the trace, which its rates are averaged with.
    """
    if one:
        drawn = drawn_like(trace, trace.layers, DRAWN // len(trace.layers), seed)
        return _rate(drawn, policy, one=True, empty=empty)
    tokens_N = np.bincount(trace.tokens.document_T) if empty else np.array([len(trace)])
    rates: dict[tuple[int, Shares], np.ndarray] = {}
    shapes = [(computing(routed)[1], choices(computing(routed)[0])) for routed in trace.layers]
    for shape, routed in zip(shapes, trace.layers, strict=True):
        if shape not in rates and policy == BELADY:
            rates[shape] = _rate(drawn_like(trace, (routed,), DRAWN, seed), policy, one=False, empty=empty)
        elif shape not in rates:
            rates[shape] = filling(*shape, tokens_N)
    return _over_layers(trace, [rates[shape] for shape in shapes], requests_L)


def static_chance(trace: RoutingTrace, requests_L: np.ndarray) -> np.ndarray:
    """What experts that never leave find if every token drew by a fair lot, C/E, weighed by requests [C + 1]."""
    sizes = map(computing_experts, trace.layers)
    return _over_layers(trace, [np.arange(experts + 1) / experts for experts in sizes], requests_L)


def filling(experts: int, share_J: Shares, tokens_N: np.ndarray) -> np.ndarray:
    """The hit rate under random routing of every cache that fetches what is asked for and knows the past alone [C + 1].

    What is inside tells nothing of what is drawn, so a cache finds C/E once it is full. Before, it holds all that was
    ever asked for: a token finds as large a part as the tokens before it took of the experts, the mean of which is
    summed over tokens in closed form.

    Args:
        share_J: which share of the tokens has 0, 1, ... K experts.
        tokens_N: tokens of each run that begins with an empty cache.
    """
    step_DD = np.zeros((experts + 1, experts + 1))
    for seen in range(experts + 1):
        for new, likely in enumerate(inside(experts, experts - seen, share_J)[: experts - seen + 1]):
            step_DD[seen, seen + new] += likely
    left_T = len(tokens_N) - np.cumsum(np.bincount(tokens_N))  # runs that have a token at each place
    seen_D, held_C, total = np.zeros(experts + 1), np.zeros(experts + 1), max(int(tokens_N.sum()), 1)
    seen_D[0] = 1
    for place, runs in enumerate(left_T[:MOST_STEPS]):
        now_C = np.append(0, np.cumsum(np.cumsum(seen_D[:0:-1])[::-1]))  # the mean of min(seen, C)
        if place == MOST_STEPS - 1 or seen_D[-1] > 1 - 1e-12:
            runs = int(left_T[place:].sum())
        held_C += runs * now_C
        if runs > left_T[place]:
            break
        seen_D = seen_D @ step_DD
    return held_C / experts / total


def _over_layers(trace: RoutingTrace, rate_L: list[np.ndarray], requests_L: np.ndarray) -> np.ndarray:
    size_C = np.arange(max(map(computing_experts, trace.layers)) + 1)
    rate_LC = np.stack([rate_C[np.minimum(size_C, len(rate_C) - 1)] for rate_C in rate_L])
    return np.asarray(requests_L @ rate_LC / max(requests_L.sum(), 1))


def _rate(trace: RoutingTrace, policy: str, *, one: bool, empty: bool) -> np.ndarray:
    return np.asarray(found(trace, policy, one=one, empty=empty).sum((0, 1)) / requested(trace).sum())


def drawn_like(trace: RoutingTrace, layers: tuple[Routed, ...], numbers: int, seed: int) -> RoutingTrace:
    """The first tokens of a trace at some of its layers, with experts that are drawn by a fair lot."""
    generator = np.random.default_rng(seed)
    tokens = min(len(trace), max(1, numbers // max(map(computing_experts, layers))))
    drawn = []
    for routed in layers:
        experts = computing_experts(routed)
        top_k = min(routed.point.top_k, experts)
        index_TK = np.argpartition(generator.random((tokens, experts), np.float32), top_k - 1, axis=1)[:, :top_k]
        drawn.append(Routed(replace(routed.point, num_experts=experts, null_experts=0, top_k=top_k), index_TK))
    return RoutingTrace(trace.tokens.where(np.arange(len(trace)) < tokens), tuple(drawn))
