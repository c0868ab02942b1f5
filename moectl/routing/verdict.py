"""The verdict in words: is it balanced, what did experts learn, does the text's order matter, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moectl.routing.analysis import Analysis, Stream
from moectl.routing.judge import LIMITS, apart, collapsed, judged, keeps, missing, room, skewed, uneven
from moectl.routing.words import between, chance, layers, percent
from moectl.traces.balance import Balance
from moectl.traces.domains import DomainShare

Level = Literal["good", "fair", "poor", "none"]

SIGNS: dict[Level, str] = {"good": "+", "fair": "~", "poor": "!", "none": "-"}
"""What a level is called where there is no colour."""


@dataclass(frozen=True, slots=True)
class Card:
    """One question and its answer: a level, a headline in words, and the numbers behind it."""

    topic: str
    level: Level
    headline: str
    detail: str


def verdict(analysis: Analysis) -> list[Card]:
    """Balance, domains, words and locality of every stream, and last how sure all of it is."""
    cards: list[Card] = []
    for stream in analysis.streams:
        own = [balance_card(stream), *domain_cards(stream), *word_cards(stream), locality_card(stream)]
        if len(analysis.streams) > 1:
            own = [Card(f"{stream.name}: {c.topic}", c.level, c.headline, c.detail) for c in own]
        cards += own
    return [*cards, confidence_card(analysis)]


def balance_card(stream: Stream) -> Card:
    """Is it balanced? The worst layer, collapsed ones by name, and experts that were not seen."""
    loads = stream.balance
    tokens = stream.recording.statistics.tokens
    if not any(map(judged, loads)):
        need = LIMITS.seen * max(load.point.num_experts / load.point.top_k for load in loads)
        return Card(
            "Balance",
            "none",
            "Too few tokens to say whether the load is even",
            f"There are {tokens:,}; from {need:,.0f} on there is an answer.",
        )
    pairs = list(zip(loads, stream.fair_max_vio, strict=True))
    worst, fair = max(pairs, key=lambda pair: pair[0].max_vio - pair[1])
    fallen = [load for load in loads if collapsed(load)]
    tilted = [load for load, fair in pairs if skewed(load, fair) and load not in fallen]
    lost = [load for load in loads if missing(load) and load not in fallen]
    unseen = sum(len(load.unseen) for load in lost)
    most = max(loads, key=lambda load: load.dropped)
    drops = most.dropped > LIMITS.dropped
    level: Level = "poor" if fallen or tilted else "fair" if lost or drops or uneven(worst, fair) else "good"
    times = f"{1 + worst.max_vio:.3g} times an even share"
    heads = []
    if fallen:
        carry = " and ".join(dict.fromkeys(f"{load.effective:.1f} of {load.point.num_experts}" for load in fallen[:3]))
        heads.append(f"{_layers(fallen)} collapsed onto {carry} experts")
    if tilted:
        heads.append(f"{_layers(tilted)} skewed: a few experts do most of the work")
    if not heads:
        heads.append(
            f"Uneven: an expert gets {times}" if uneven(worst, fair) else f"Balanced: no expert gets more than {times}"
        )
    if lost:
        heads.append(f"{unseen} expert{'s were' if unseen > 1 else ' was'} not seen")
    if drops:
        heads.append(f"layer {most.point.label} drops {percent(most.dropped)} of the assignments")
    fewest = min(loads, key=room)
    share = percent(worst.busiest_share)
    detail = [
        f"Worst in layer {worst.point.label}: expert {worst.busiest} gets {times}, {share} of the tokens.",
        f"A fair lot would give {1 + fair:.2f} times.",
        f"Fewest in effect: {fewest.effective:.1f} of {fewest.point.num_experts}, in layer {fewest.point.label}.",
    ]
    if tilted and not stream.domains:
        detail.append("On text of one domain that may be specialisation: give some of several.")
    if lost:
        detail.append(
            f"Unseen in {tokens:,} tokens: {_unseen(lost)}; chance of that if fair: "
            f"{chance(max(load.unseen_chance for load in lost))}."
        )
    if stream.pooled_aux is not None:
        largest = max(stream.scores, key=lambda scores: scores.aux / scores.point.top_k)
        detail.append(
            f"Balancing loss {largest.aux:.3g} in layer {largest.point.label} ({largest.point.top_k} if balanced); "
            f"pooled over the layers, as models report it, {stream.pooled_aux:.3g}."
        )
    return Card("Balance", level, "; ".join(heads), " ".join(detail))


def domain_cards(stream: Stream) -> list[Card]:
    """Do domains have their experts? Nothing if there is but one."""
    if not stream.domains:
        return []
    parted = [shares.point.label for shares in stream.domains if apart(shares)]
    strongest = max(stream.domains, key=contrast)
    detail = []
    if strongest.strongest:
        name, expert, share = strongest.strongest
        detail.append(
            f"Most in layer {strongest.point.label}: expert {expert} serves {percent(share)} of the tokens of {name} "
            f"(even use: {percent(strongest.chance)})."
        )
    clear = bool(parted)
    if stream.separation:
        token, document = stream.separation.token, stream.separation.document
        beyond_chance = all(told.accuracy_interval[0] > told.chance_accuracy for told in (token, document))
        clear |= beyond_chance and document.accuracy > LIMITS.told
        detail.append(
            f"From the first choices of one token its domain has probability {percent(token.probability)} "
            f"({between(token.probability_interval)}; chance {percent(token.chance_probability)}). Those of a document "
            f"tell its domain in {percent(document.accuracy)} of the cases ({between(document.accuracy_interval)}; "
            f"chance {percent(document.chance_accuracy)})."
        )
    if parted:
        head = f"Domains use different experts in {layers(parted)}"
    elif clear:
        head = "Domains differ a little, in many experts"
    elif all((shares.high_DE.min(1) < 1).sum() < 2 for shares in stream.domains):
        head = "Too few documents to say whether domains use different experts"
    else:
        head = "Domains use the same experts"
    return [Card("Domains", "good" if clear else "none", head, " ".join(detail))]


def word_cards(stream: Stream) -> list[Card]:
    """Does the token alone decide? Nothing if ids were not recorded."""
    if not stream.context:
        return []
    most = max(stream.context, key=lambda each: each.value)
    decided = [each.point.label for each in stream.context if each.value > LIMITS.words]
    told = percent(max(most.value, 0.0))
    head = f"The token id decides in {layers(decided)}" if decided else f"The token id explains at most {told}"
    detail = [f"Most in layer {most.point.label}: of the entropy of the first choice the id tells {told}."]
    if words := stream.vocabulary["input"]:
        peak = max(words, key=lambda each: each.value - each.null)
        detail.append(
            f"In layer {peak.point.label}, an id keeps to one expert {percent(peak.value)} of the time (shuffled: "
            f"{percent(peak.null)}; {peak.ids} frequent ids)."
        )
    level: Level = "fair" if 2 * len(decided) > len(stream.context) else "none"
    return [Card("Words", level, head, " ".join(detail))]


def locality_card(stream: Stream) -> Card:
    """Do consecutive tokens share experts, and would keeping a quarter of them at hand help?"""
    shares, even = zip(*((row["hot"], row["hot_chance"]) for row in stream.rows), strict=True)
    quarter = "The busiest quarter of the experts takes"
    if stream.hot[0].held_out_E is not None:
        quarter = "The quarter of the experts that is busiest in one half of the documents takes, in the other,"
    hot = f"{quarter} {_span(shares)} of the assignments ({_span(even)} if even)."
    if not stream.repetition:
        return Card("Locality", "none", "Not known whether consecutive tokens share experts", hot)
    most = max(stream.repetition, key=lambda each: each.first - each.first_null)
    kept = [each.point.label for each in stream.repetition if keeps(each)]
    if kept:
        head = f"Consecutive tokens keep their expert in {layers(kept)}"
    elif most.pairs * most.first_null < LIMITS.seen:
        head = "Too few tokens to say whether consecutive ones share experts"
    else:
        head = "Consecutive tokens share experts hardly more than by chance"
    repeats = (
        f"In layer {most.point.label}, {percent(most.first)} of the tokens repeat the first choice of the one before "
        f"({percent(most.first_null)} if independent)."
    )
    return Card("Locality", "good" if kept else "none", head, f"{repeats} {hot}")


def confidence_card(analysis: Analysis) -> Card:
    """How much text stands behind the numbers."""
    first = analysis.streams[0].recording.statistics
    size = f"{first.tokens:,} tokens in {first.documents:,} document{'s' * (first.documents != 1)}"
    found = doubts(analysis)
    if not found:
        return Card("How sure", "good", f"Measured on {size}", "Intervals are 95%, by bootstrap over documents.")
    return Card("How sure", "fair", f"Measured on {size}, with reservations", _sentence("; ".join(found)))


def doubts(analysis: Analysis) -> list[str]:
    """What makes the numbers less than certain, or is not known."""
    found = []
    for stream in analysis.streams:
        statistics, sampled = stream.recording.statistics, stream.recording.sampled
        need = LIMITS.tokens * max(load.point.num_experts / load.point.top_k for load in stream.balance)
        if statistics.tokens < need:
            found.append(f"fewer than {need:,.0f} tokens")
        blocks_D = np.bincount(statistics.domain_B[statistics.tokens_B > 0], minlength=len(statistics.domains))
        few = [name for name, blocks in zip(statistics.domains, blocks_D, strict=True) if blocks < LIMITS.documents]
        if few:
            found.append(f"fewer than {LIMITS.documents} documents of {', '.join(few)}")
        if 0 < sampled < 1:
            found.append(f"{percent(sampled)} of the tokens stand for all, except in balance and domains")
    if analysis.off:
        found.append(f"this recording has nothing for {', '.join(sorted(analysis.off))}")
    return list(dict.fromkeys(found))


def contrast(shares: DomainShare) -> float:
    """By how much the strongest domain's share of an expert exceeds that of the typical other domain."""
    if shares.strongest is None:
        return 0.0
    _name, expert, share = shares.strongest
    used_D = np.sort(shares.share_DE[shares.share_DE.any(1), expert])
    others = used_D[:-1] if len(used_D) > 1 else [shares.chance]
    return share - float(np.median(others))


def _layers(loads: Sequence[Balance]) -> str:
    named = layers([load.point.label for load in loads])
    return f"L{named[1:]} {'is' if len(loads) == 1 else 'are'}"


def _unseen(loads: Sequence[Balance]) -> str:
    parts = [
        f"{', '.join(map(str, load.unseen[:6]))}{' ...' * (len(load.unseen) > 6)} of layer {load.point.label}"
        for load in loads
    ]
    return "; ".join(parts[:4]) + ("; ..." if len(parts) > 4 else "")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _span(values: Sequence[object]) -> str:
    numbers = sorted(value for value in values if isinstance(value, float))
    low, high = percent(numbers[0]), percent(numbers[-1])
    return low if low == high else f"{low} to {high}"
