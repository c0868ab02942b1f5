"""Which expert leaves a full cache: every policy at every size of the cache, in one pass over the requests.

A step asks for the experts of one token at one layer, all at once: hits are counted before any of them comes in, and
none of them leaves in that step. Where a priority that does not depend on the size of the cache decides what stays, a
smaller cache holds a part of what a larger one holds, so one list tells all of them: an expert at place p is in every
cache of more than p (Mattson, Gecsei, Slutz and Traiger, IBM Systems Journal 9, 1970). All policies here are such.

Legend: N steps, K experts of a step, C keys (experts that share a cache), L layers that take turns, G groups of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.compiled import compiled

LRU, LFU, PROTECTED, INFINITY, BELADY = "LRU", "LFU", "LRU, next layers protected", "MoE-Infinity", "Belady"

KEEP, FORGET, EMPTY = 0, 1, 2
"""What a new document does to a cache: nothing; it resets the counts of MoE-Infinity; it empties the cache."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What caches are asked for.

    Attributes:
        key_NK: the experts of each step, int32; negative where there is none.
        layer_C: the layer of each key, int64. Step n is one of layer n modulo L.
        start_N: whether a step is the first of a document.
        group_N: what each step is counted under, int64.
        groups: how many of those there are.
        empty: whether a cache is empty at the start of each document.
    """

    key_NK: np.ndarray
    layer_C: np.ndarray
    start_N: np.ndarray
    group_N: np.ndarray
    groups: int
    empty: bool = False

    @property
    def layers(self) -> int:
        """L."""
        return int(self.layer_C[-1]) + 1


def hits(requests: Requests, policy: str) -> np.ndarray:
    """How many requests find their expert in a cache of 0, 1, ... C under a policy [G, C + 1], int64.

    Exact for caches of K experts or more: a smaller one cannot hold a step. What stays:

    LRU: what was asked for last; in a step the last listed. mixtral-offloading does so in each layer (arXiv 2312.17238,
        src/expert_cache.py).
    LFU: what was asked for most often since the start, then last.
    PROTECTED: the experts of this layer and the next two, then as LRU (`lru_score_with_layers` of MoE-Infinity's
        moe_infinity/memory/expert_priority_score.py). In a cache of one layer it is LRU.
    INFINITY: what the document asked for most often so far, times 1 - layer/L, since for early layers there is no time
        to prefetch (arXiv 2401.14361). The released `priority_score` multiplies that by the visits of what is in the
        cache and weighs an encoder's layers otherwise. The released engine uses no such score: it counts visits since
        an expert came in, and spares what it is about to prefetch; core/parallel/expert_dispatcher.cpp evicts the least
        visited of the rest, core/prefetch/task_scheduler.cpp the most visited.
    BELADY: what will be asked for soonest. No policy that fetches on demand finds more.

    Args:
        policy: one of the names above.
    """
    layers, keys = requests.layers, len(requests.layer_C)
    gain_L, turn_LL = np.zeros(layers), np.zeros((layers, layers))
    next_NK = np.empty((0, requests.key_NK.shape[1]), np.int32)
    if policy == LFU:
        gain_L += 1
    elif policy == INFINITY:
        gain_L += 1 - np.arange(layers) / layers
    elif policy == PROTECTED:
        ahead_LL = np.arange(layers) - np.arange(layers)[:, None]
        turn_LL += (ahead_LL >= 0) & (ahead_LL < 3)
    elif policy == BELADY:
        next_NK = _next_uses(requests.key_NK, keys)
    document = EMPTY if requests.empty else FORGET if policy == INFINITY else KEEP
    place_GC = np.zeros((requests.groups, keys + 1), np.int64)
    start_N, group_N = requests.start_N, requests.group_N
    _replay(requests.key_NK, next_NK, requests.layer_C, gain_L, turn_LL, start_N, document, group_N, place_GC)
    hits_GC = np.zeros_like(place_GC)
    np.cumsum(place_GC[:, :-1], axis=1, out=hits_GC[:, 1:])
    return hits_GC


def asked(requests: Requests) -> np.ndarray:
    """How many requests there are [G], int64; an expert that a step lists twice is asked for once."""
    key_NK = np.sort(requests.key_NK, axis=1)
    new_NK = key_NK >= 0
    new_NK[:, 1:] &= key_NK[:, 1:] != key_NK[:, :-1]
    return np.bincount(requests.group_N, new_NK.sum(1), requests.groups).astype(np.int64)


@compiled
def _next_uses(key_NK: np.ndarray, keys: int) -> np.ndarray:
    steps, choices = key_NK.shape
    soonest_C = np.full(keys, steps, np.int32)
    next_NK = np.full((steps, choices), steps, np.int32)
    for step in range(steps - 1, -1, -1):
        for choice in range(choices):
            if key_NK[step, choice] >= 0:
                next_NK[step, choice] = soonest_C[key_NK[step, choice]]
        for choice in range(choices):
            if key_NK[step, choice] >= 0:
                soonest_C[key_NK[step, choice]] = step
    return next_NK


@compiled
def _replay(
    key_NK: np.ndarray,
    next_NK: np.ndarray,
    layer_C: np.ndarray,
    gain_L: np.ndarray,
    turn_LL: np.ndarray,
    start_N: np.ndarray,
    document: int,
    group_N: np.ndarray,
    place_GC: np.ndarray,
) -> None:
    """Count requests by the place of their expert; the last column counts those that were never asked for before.

    The priority of a key is its value, plus what the turn of a layer adds, then its last request. With `next_NK` the
    value is the next use, negative; else every request adds `gain_L` of the layer.
    """
    steps, choices = key_NK.shape
    keys, layers, foreseen = len(layer_C), len(gain_L), len(next_NK) > 0
    value_C, used_C = np.zeros(keys), np.full(keys, -1, np.int64)
    at_C, list_C, size = np.full(keys, keys, np.int64), np.empty(keys, np.int64), 0
    for step in range(steps):
        layer, first = step % layers, np.int64(step) * choices
        if start_N[step] and document != 0:
            value_C[:] = 0
            if document == 2:
                at_C[:] = keys
                size = 0
        for choice in range(choices):
            key = key_NK[step, choice]
            if key >= 0 and used_C[key] < first:
                place_GC[group_N[step], at_C[key]] += 1
                used_C[key] = first + choice
                value_C[key] = -next_NK[step, choice] if foreseen else value_C[key] + gain_L[layer]
        for choice in range(choices):
            key = key_NK[step, choice]
            if key < 0:
                continue
            end = at_C[key]
            if end == keys:
                end, size = size, size + 1
            # The key comes to the front, and at every place the one of less priority is pushed on, to where it was.
            pushed, at_C[key] = list_C[0], 0
            list_C[0] = key
            if end == 0:
                continue
            worth, last = value_C[pushed] + turn_LL[layer, layer_C[pushed]], used_C[pushed]
            if last >= first:
                worth = np.inf
            for place in range(1, end):
                other = list_C[place]
                other_worth, other_last = value_C[other] + turn_LL[layer, layer_C[other]], used_C[other]
                if other_last >= first:
                    other_worth = np.inf
                if other_worth < worth or (other_worth == worth and other_last < last):
                    list_C[place], at_C[pushed] = pushed, place
                    pushed, worth, last = other, other_worth, other_last
            list_C[end], at_C[pushed] = pushed, end
