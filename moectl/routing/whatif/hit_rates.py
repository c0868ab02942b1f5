"""What a trace asks of caches in each layer or of one over all, what it finds there, and what random routing finds.

Legend: T tokens, K experts per token, E experts, L layers, D domains, C experts that a cache holds of a layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moectl.routing.placement.loads import halves
from moectl.routing.whatif.asked import computing, computing_experts
from moectl.routing.whatif.eviction import BELADY, Requests, asked, hits
from moectl.traces.trace import Routed, RoutingTrace

DRAWN = 1 << 20
"""How many numbers a layer of random routing is drawn from."""


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

    In a full cache of a layer every policy that knows the past alone hits C/E: what it holds tells nothing of the draw.
    All else is simulated.

    Args:
        requests_L: of each layer of the trace, which its rates are averaged with.
    """
    size_C = np.arange(max(map(computing_experts, trace.layers)) + 1)
    if one:
        drawn = drawn_like(trace, trace.layers, DRAWN // len(trace.layers), seed)
        return _rate(drawn, policy, one=True, empty=empty)
    rates: dict[tuple[int, int], np.ndarray] = {}
    for routed in trace.layers:
        shape = (computing_experts(routed), routed.point.top_k)
        if shape not in rates and (policy == BELADY or empty):
            rates[shape] = _rate(drawn_like(trace, (routed,), DRAWN, seed), policy, one=False, empty=empty)
        rates.setdefault(shape, np.arange(shape[0] + 1) / shape[0])
    shapes = [(computing_experts(routed), routed.point.top_k) for routed in trace.layers]
    rate_LC = np.stack([rates[shape][np.minimum(size_C, shape[0])] for shape in shapes])
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
