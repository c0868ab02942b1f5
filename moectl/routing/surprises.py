"""What stands out: single experts, pairs and words, each with its number, its null, and how to look closer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moectl.routing.analysis import Analysis, Stream
from moectl.routing.judge import LIMITS, apart, collapsed, judged, keeps, missing
from moectl.routing.verdict import contrast
from moectl.routing.words import chance, percent

PER_KIND = 2
"""Surprises of one kind, at most, so that the list does not say one thing five times."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """One finding.

    Attributes:
        kind: load, unseen, domain, word, pair, flow or repetition.
        layer: its label; expert: its number, None if it is about the whole layer.
        text: a sentence with the number and its null.
        strength: in doublings of the null, for the order.
        look: the option that looks closer.
    """

    kind: str
    layer: str
    expert: int | None
    text: str
    number: float
    null: float
    strength: float
    look: str


def surprises(analysis: Analysis, most: int = 5) -> list[Surprise]:
    """The strongest findings, at most `PER_KIND` of a kind and one of a kind in a layer."""
    found = [
        each
        if len(analysis.streams) == 1 or each.layer.startswith(stream.name)
        else replace(each, layer=f"{stream.name} {each.layer}")
        for stream in analysis.streams
        for each in _all(stream)
    ]
    kept: list[Surprise] = []
    for each in sorted(found, key=lambda each: -each.strength):
        same = [other for other in kept if other.kind == each.kind]
        if len(same) < PER_KIND and each.layer not in (other.layer for other in same):
            kept.append(each)
    return kept[:most]


def _all(stream: Stream) -> Iterator[Surprise]:
    enough = {load.point: judged(load) for load in stream.balance}
    fallen = {load.point for load in stream.balance if collapsed(load)}
    yield from _loads(stream)
    for shares in stream.domains:
        if apart(shares) and shares.strongest and enough[shares.point]:
            name, expert, share = shares.strongest
            others = share - contrast(shares)
            text = (
                f"expert {expert} serves {percent(share)} of the tokens of {name}, "
                f"{percent(others)} of those of the typical other domain (even: {percent(shares.chance)})"
            )
            yield _surprise("domain", shares.point.label, expert, text, share, max(others, shares.chance / 8))
    for repeats in stream.repetition:
        if keeps(repeats) and repeats.point not in fallen:
            text = (
                f"{percent(repeats.first)} of the tokens repeat the first choice of the one before "
                f"({percent(repeats.first_null)} if independent)"
            )
            yield _surprise("repetition", repeats.point.label, None, text, repeats.first, repeats.first_null)
    for both in stream.coactivation:
        if both.strongest and both.chance and enough[both.point] and both.point not in fallen:
            one, other, share = both.strongest[0]
            load = stream.balance[stream.points.index(both.point)]
            null = max(both.chance, float(load.share_E[[one, other]].min()) * both.point.top_k)
            tokens = float(load.share_E[[one, other]].max()) * both.point.top_k * len(stream.recording.trace)
            if share > 2 * null and _beyond_luck(share * tokens, null * tokens, both.together_EE.size):
                text = f"experts {one} and {other} go together in at least {percent(share)} of their tokens"
                yield _surprise("pair", both.point.label, one, f"{text} (by their loads {percent(null)})", share, null)
    for step in stream.flow:
        yield from _flow(step.source.label, step.target.label, step.count_EE)


def _loads(stream: Stream) -> Iterator[Surprise]:
    for load, fair in zip(stream.balance, stream.fair_max_vio, strict=True):
        point = load.point
        even = (1 - load.dropped) * point.top_k / point.num_experts
        if judged(load) and not collapsed(load) and load.max_vio > 2 * fair + 0.5:
            text = f"expert {load.busiest} serves {percent(load.busiest_share)} of the tokens (even: {percent(even)})"
            yield _surprise("load", point.label, load.busiest, text, load.busiest_share, even)
        if missing(load) and not collapsed(load):
            named = ", ".join(map(str, load.unseen[:6])) + ", ..." * (len(load.unseen) > 6)
            text = f"expert{'s' * (len(load.unseen) > 1)} {named} not seen in {load.tokens:,} tokens"
            text += f" (chance if fair: {chance(load.unseen_chance)})"
            doublings = min(-math.log2(max(load.unseen_chance, 1e-300)) / 4, 6.0)
            yield Surprise(
                "unseen", point.label, load.unseen[0], text, 0.0, load.unseen_chance, doublings, "--max-tokens"
            )


def _flow(source: str, target: str, count_EE: np.ndarray) -> Iterator[Surprise]:
    """The expert whose tokens most often go to one expert of the next layer, if far more often than others do."""
    total = count_EE.sum()
    from_E = count_EE.sum(1)
    often_E = from_E >= max(100, total / len(from_E) / 2)
    if not often_E.any():
        return
    expected_EE = np.outer(from_E, count_EE.sum(0)) / total
    sure_EE = often_E[:, None] & _beyond_luck(count_EE, expected_EE, count_EE.size)
    share_EE = np.where(sure_EE, count_EE / from_E.clip(1)[:, None], 0.0)
    one, other = (int(place) for place in np.unravel_index(np.argmax(share_EE), share_EE.shape))
    share, null = float(share_EE[one, other]), float(count_EE[:, other].sum() / total)
    if share > 2 * null:
        text = (
            f"{percent(share)} of the tokens of expert {one} go on to expert {other} of layer {target} "
            f"(of all tokens: {percent(null)})"
        )
        yield _surprise("flow", source, one, text, share, null)


def _beyond_luck(count_X: Any, expected_X: Any, tried: int) -> Any:
    """Whether counts exceed what is expected by more than the best of so many tries would by chance.

    By Chernoff's bound on the tail of a Poisson distribution: the largest of many small counts is no finding.
    """
    ratio_X = np.maximum(count_X, 1e-300) / np.maximum(expected_X, 1e-300)
    bound_X = count_X * np.log(ratio_X) - count_X + expected_X
    return (count_X > expected_X) & (bound_X > math.log(tried / LIMITS.surprising))


def _surprise(kind: str, layer: str, expert: int | None, text: str, number: float, null: float) -> Surprise:
    look = f"--mask {shlex.quote(f'{layer}:{expert}')}" if kind in ("load", "domain") else "--html FILE"
    return Surprise(kind, layer, expert, text, number, null, math.log2(number / null), look)
