"""Loads of the experts of a layer over parts of a trace, counted piece by piece.

Experts that compute nothing (identity, zero, skip) are on no GPU and are left out.
Legend: E experts, P parts of the tokens, B batches of tokens that follow one another.
"""

from __future__ import annotations

import numpy as np

from moectl.errors import InputError
from moectl.routing.whatif.asked import computing_experts
from moectl.traces.statistics import counted
from moectl.traces.trace import Routed, RoutingTrace, Tokens

_PIECE = 1 << 16
"""Tokens that are counted at once: more take memory, fewer take time."""


def part_loads(routed: Routed, part_T: np.ndarray, parts: int) -> np.ndarray:
    """Assignments to each expert from each part of the tokens [P, E], int64."""
    count_PE = np.zeros((parts, routed.point.num_experts), np.int64)
    for start in range(0, len(part_T), _PIECE):
        piece = slice(start, start + _PIECE)
        count_PE += counted(routed.index_TK[piece], part_T[piece], routed.point.num_experts, parts)
    return count_PE[:, : computing_experts(routed)]


def batch_loads(routed: Routed, size: int) -> np.ndarray:
    """Assignments to each expert from every `size` tokens [B, E], int64; the last, incomplete batch is left out."""
    batches = len(routed.index_TK) // size
    at_once = max(1, _PIECE // size)
    pieces = [
        counted(
            routed.index_TK[first * size : last * size],
            np.repeat(np.arange(last - first), size),
            routed.point.num_experts,
            last - first,
        )
        for first in range(0, batches, at_once)
        for last in [min(first + at_once, batches)]
    ]
    empty = np.zeros((0, routed.point.num_experts), np.int64)
    return np.concatenate([empty, *pieces])[:, : computing_experts(routed)]


def halves(tokens: Tokens) -> np.ndarray:
    """Which half each token is of, 0 or 1 [T]: documents in turn, domain by domain; a single one is cut in the middle.

    What is fitted on one half and judged on the other has not seen what it is judged by.
    """
    present = np.flatnonzero(np.bincount(tokens.document_T, minlength=len(tokens.domain_N)))
    if len(present) < 2:
        return np.arange(len(tokens)) * 2 // max(len(tokens), 1)
    half_N = np.zeros(len(tokens.domain_N), np.int64)
    half_N[present[np.argsort(tokens.domain_N[present], kind="stable")]] = np.arange(len(present)) % 2
    return np.asarray(half_N[tokens.document_T])


def require_tokens(trace: RoutingTrace, name: str, least: int = 2) -> None:
    """Refuse a trace with too little in it for a what-if.

    Raises:
        InputError: it has fewer than `least` tokens, or no layers.
    """
    if len(trace) < least or not trace.layers:
        raise InputError(
            f"The trace has {len(trace)} tokens at {len(trace.layers)} layers.",
            f"The what-if {name} takes {least} tokens at least.",
            "Capture more text: moectl analyze-routing MODEL --data FILE --trace DIR.",
        )
