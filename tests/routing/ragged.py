"""Traces with layers of different shapes, and what counting them by hand needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from small_traces import home_of, random_trace

from moectl.routing.whatif.finding import Finding
from moectl.traces.trace import RoutingTrace

SHAPES = (
    ((4, 2, 0), (4, 2, 0)),
    ((6, 2, 0), (3, 3, 0), (8, 1, 0)),
    ((5, 5, 0),),
    ((1, 1, 0), (2, 1, 0)),
    ((7, 3, 2), (6, 2, 0)),
)
"""Experts, choices, and how many of the experts compute nothing, of each layer."""

LENGTHS = ((40, 0, 23, 9, 0, 31), (17,), (0, 0, 12, 1, 1, 1))
"""Of documents."""


def ragged(
    seed: int, shapes: Sequence[tuple[int, int, int]], lengths: Sequence[int], domains: int = 2, dropped: float = 0.1
) -> RoutingTrace:
    """Layers 1, 3, 5, ... of the given shapes (dense ones in between), with weights, scores and dropped choices."""
    made = [
        random_trace(seed + number, list(lengths), experts, top_k, domains, 1, dropped)
        for number, (experts, top_k, _) in enumerate(shapes)
    ]
    layers = []
    for number, (each, (_, _, nulls)) in enumerate(zip(made, shapes, strict=True)):
        own, at = each.layers[0], 2 * number + 1
        layers.append(replace(own, point=replace(own.point, name=f"layers.{at}", layer=at, null_experts=nulls)))
    return RoutingTrace(made[0].tokens, tuple(layers))


TRACES = [ragged(number, *each) for number, each in enumerate(product(SHAPES, LENGTHS))]
ONE_TOKEN = ragged(0, ((4, 2, 0), (6, 1, 0)), (1,))


def cells(found: Finding) -> list[dict[str, Any]]:
    """The rows of a finding's table, by column."""
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def layers_of(found: Finding) -> list[dict[str, Any]]:
    """The rows above the mean."""
    every = cells(found)
    return every[: [row["layer"] for row in every].index("mean")]


def chosen(traced: RoutingTrace, layer: int) -> list[list[int]]:
    """The experts of every token that compute something, in the order of the router."""
    routed = traced.layers[layer]
    experts = routed.point.num_experts - routed.point.null_experts
    return [[int(expert) for expert in row if 0 <= expert < experts] for row in routed.index_TK]


def experts_of(traced: RoutingTrace, layer: int) -> int:
    """How many of a layer compute something."""
    return traced.layers[layer].point.num_experts - traced.layers[layer].point.null_experts


def parts(experts: int, groups: int) -> list[int]:
    """The group of each expert, neighbours together; spread out where there are more groups."""
    if groups > experts:
        return [expert * groups // experts for expert in range(experts)]
    return [home_of(expert, experts, groups) for expert in range(experts)]


def halved(traced: RoutingTrace) -> list[int]:
    """The half of each token: documents that have tokens in turn, domain by domain; a single one in the middle."""
    tokens = traced.tokens
    there = sorted(set(tokens.document_T.tolist()))
    if len(there) < 2:
        return [at * 2 // len(tokens) for at in range(len(tokens))]
    order = sorted(there, key=lambda document: (tokens.domain_N[document], document))
    half = {document: number % 2 for number, document in enumerate(order)}
    return [half[document] for document in tokens.document_T.tolist()]
