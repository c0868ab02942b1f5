"""What the page's script reads: loads, words, partners and a sample of the text with its experts, within byte caps.

Legend: L points, E experts, K experts per token, S tokens of the sample.
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import numpy as np

from moectl.report.svg import PALETTE
from moectl.routing.analysis import Analysis, Stream
from moectl.routing.page.figures import pool
from moectl.routing.spelling import Spell
from moectl.text import escape
from moectl.traces.trace import RoutingTrace

BUDGET = 800_000
"""Bytes of each kind of data of all streams together: the page stays below 8 MB."""
FIGURES = 1_200_000
"""Bytes of each kind of figure that is drawn for every layer."""
MOST_TOKENS = 2400
"""Of the text that is shown, however few the layers."""
PARTNERS = 5


def payload(analysis: Analysis, spell: Spell | None) -> str:
    """The data as JSON that can stand inside a script element."""
    used: set[int] = set()
    streams = [_stream(stream, spell, BUDGET // len(analysis.streams), used) for stream in analysis.streams]
    tokens = {} if spell is None else {str(token): _visible(spell([token])[0]) for token in sorted(used)}
    return embedded({"palette": PALETTE, "tokens": tokens, "streams": streams})


def embedded(document: dict[str, Any]) -> str:
    """JSON without the characters that could end a script element, or a line, early."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def spread(count: int, most: int) -> list[int]:
    """Numbers below `count`, at most `most` of them, evenly spaced from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(number) for number in np.linspace(0, count - 1, max(most, 1))})


def _stream(stream: Stream, spell: Spell | None, budget: int, used: set[int]) -> dict[str, Any]:
    points, statistics = stream.points, stream.recording.statistics
    worst = max(range(len(points)), key=lambda number: stream.balance[number].max_vio)
    return {
        "layers": [escape(point.label) for point in points],
        "experts": [point.num_experts for point in points],
        "topk": [point.top_k for point in points],
        "load": [_rounded(load.share_E * point.top_k) for load, point in zip(stream.balance, points, strict=True)],
        "first": [_rounded(load.first_BE.sum(0) / max(statistics.tokens, 1)) for load in statistics.loads],
        "pooled": pool(stream),
        "start": [worst, stream.balance[worst].busiest],
        "domains": [escape(name) for name in statistics.domains],
        "share": _shares(stream, budget),
        "words": _words(stream, budget, used),
        "mates": [round(both.chance * (both.point.num_experts - 1), 4) for both in stream.coactivation],
        "partners": _within(stream, [_strongest(both.together_EE) for both in stream.coactivation], budget // 2),
        "next": _within(stream, [_strongest(_normalised(step.count_EE)) for step in stream.flow], budget // 2),
        "text": None if spell is None else _text(stream.recording.trace, spell, budget),
    }


def _shares(stream: Stream, budget: int) -> list[Any]:
    """For each layer the domains' shares with the ends of their intervals, [3][D][E]."""
    made = [[_rounded(part) for part in (each.share_DE, each.low_DE, each.high_DE)] for each in stream.domains]
    return _within(stream, made, budget)


def _words(stream: Stream, budget: int, used: set[int]) -> list[Any]:
    found = stream.vocabulary["input"]
    made = _within(
        stream,
        [
            [[[each.token, round(each.share, 3), each.count] for each in favourites] for favourites in words.top]
            for words in found
        ],
        budget,
    )
    used |= {token for layer in made if layer for favourites in layer for token, _share, _count in favourites}
    return made


def _within(stream: Stream, made: list[Any], budget: int) -> list[Any]:
    """What was made of each layer, for as many as the budget allows, evenly spaced; null for the others."""
    if not made:
        return [None] * len(stream.points)
    largest = max(len(json.dumps(each, separators=(",", ":"))) for each in made)
    kept = set(spread(len(made), budget // largest))
    parts = [each if number in kept else None for number, each in enumerate(made)]
    return parts + [None] * (len(stream.points) - len(made))


def _strongest(share_EE: np.ndarray) -> list[list[list[float]]]:
    share_EE = np.nan_to_num(share_EE)
    order_EP = np.argsort(-share_EE, axis=1, kind="stable")[:, :PARTNERS]
    return [
        [[int(other), round(float(share_E[other]), 4)] for other in order_P if share_E[other] > 0]
        for share_E, order_P in zip(share_EE, order_EP, strict=True)
    ]


def _normalised(count_EE: np.ndarray) -> np.ndarray:
    return np.asarray(count_EE / count_EE.sum(1, keepdims=True).clip(1))


def _text(trace: RoutingTrace, spell: Spell, budget: int) -> dict[str, Any] | None:
    """The beginning of a document of each domain in turn, with the experts of every layer."""
    tokens = trace.tokens
    if len(trace) == 0 or int(tokens.token_T.max()) < 0:
        return None
    each = sum(routed.point.top_k for routed in trace.layers) * 4
    room = min(MOST_TOKENS, budget // each)
    kept = _sample(trace, room)
    documents = []
    for rows in kept:
        name = tokens.domains[tokens.domain_T[rows[0]]]
        pieces = [_visible(piece, lines=True) for piece in spell(tokens.token_T[rows].tolist())]
        documents.append({"name": f"{escape(name)}, document {tokens.document_T[rows[0]]}", "pieces": pieces})
    row_S = np.concatenate(kept)
    ids, weights = [], []
    for routed in trace.layers:
        ids.append(_base64(routed.index_TK[row_S].astype("<i2")))
        weights.append(None if routed.weight_TK is None else _base64(_bytes(routed.weight_TK[row_S])))
    return {"documents": documents, "ids": ids, "weights": weights}


def _sample(trace: RoutingTrace, room: int) -> list[np.ndarray]:
    """Rows of documents: of each domain in turn, an equal part of the room for the first of each."""
    tokens = trace.tokens
    starts = np.flatnonzero(np.diff(tokens.document_T, prepend=-1))
    ends = np.append(starts[1:], len(tokens))
    turns: dict[int, int] = {}
    order = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        domain = int(tokens.domain_T[start])
        turns[domain] = turns.get(domain, 0) + 1
        order.append((turns[domain], domain, start, end))
    kept, part = [], max(1, room // max(len(turns), 1))
    for _turn, _domain, start, end in sorted(order):
        size = min(end - start, part, room)
        if size < 1:
            break
        kept.append(np.arange(start, start + size))
        room -= size
    return kept


def _bytes(weight_SK: np.ndarray) -> np.ndarray:
    """Weights as parts of 255 of a token's sum."""
    weight_SK = np.abs(weight_SK.astype(np.float64))
    return np.asarray(np.rint(255 * weight_SK / weight_SK.sum(1, keepdims=True).clip(1e-9)), np.uint8)


def _base64(array: np.ndarray) -> str:
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _rounded(values: np.ndarray) -> list[Any]:
    return list(np.round(values, 4).tolist())


def _visible(piece: str, *, lines: bool = False) -> str:
    """Control characters made visible; line breaks and tabs stay where text is read as text."""
    return "".join(c if lines and c in "\n\t" else escape(c) for c in piece)
