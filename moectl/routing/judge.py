"""What counts as collapsed, skewed, unseen, apart, repeating: every threshold with its reason, and the tests.

Legend: E experts, k experts per token, D domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moectl.routing.analysis import Stream
from moectl.routing.words import percent
from moectl.traces.balance import Balance
from moectl.traces.domains import DomainShare
from moectl.traces.locality import Repetition


@dataclass(frozen=True, slots=True)
class Limits:
    """Where words change. Shares of room are (effective experts - k) / (E - k): 0 is the fewest possible, 1 is even.

    What OLMoE and Mixtral do is from their published counts (tests/traces has them).

    Attributes:
        collapsed: below this share of room a layer has collapsed. A router stuck on k experts is at 0; of OLMoE's
            layers the least even one, on Wikipedia alone, is at 0.42.
        skewed, skewed_max_vio: below this share of room, or above this MaxVio, few experts do most of the work. On the
            mixed text of C4 OLMoE is at 0.85 and more, and at 2.0 and less; on single domains as far as 0.42 and 6.8.
        even_max_vio: above it the busiest expert gets more than twice an even share. Mixtral stays below 0.33.
        even_part: above this part of the MaxVio of an expert that serves every token, E/k - 1, the load is uneven too:
            of 3 experts of which a token uses 2 none can get more than 1.5 times an even share.
        luck: a MaxVio within this multiple of what a fair lot gives says nothing, whatever the other limits.
        seen: with fewer tokens per expert than this, under a fair lot, the load is not judged.
        surprising: an unseen expert counts if its chance under a fair lot is below this; a pair of experts if that of
            the best pair among all is.
        dropped: with a larger share of the assignments going nowhere a layer drops: at one in a hundred in each of 32
            layers, a quarter of the tokens lose something.
        apart: domains part in a layer if the whole interval of one domain's share of an expert is above this multiple
            of the whole of another's: of many experts some intervals miss each other by chance, but not by half.
        told: domains differ, if in no expert that clearly, where paths tell more than this share of the documents.
        repeats, repeats_errors: consecutive tokens keep together if they repeat by this part more often than
            independent ones do, or differ by this part less often, and by so many standard errors more than luck.
        words: token ids decide if they explain this much of the first choice; a table of ids is at 1.
        tokens, documents: with fewer, per expert and per domain, numbers are called uncertain: the spread of a load is
            then 10% and more of it, and a bootstrap of few documents draws the same ones again and again.
    """

    collapsed: float = 0.1
    skewed: float = 0.4
    skewed_max_vio: float = 3.0
    even_max_vio: float = 1.0
    even_part: float = 0.5
    luck: float = 1.5
    seen: float = 10.0
    surprising: float = 1e-3
    dropped: float = 0.01
    apart: float = 1.5
    told: float = 0.9
    repeats: float = 0.25
    repeats_errors: float = 3.0
    words: float = 0.5
    tokens: float = 100.0
    documents: int = 10


LIMITS = Limits()


def room(load: Balance) -> float:
    """How much of the room between k and E experts the load uses; 1 where there is no choice."""
    experts, top_k = load.point.num_experts, load.point.top_k
    return 1.0 if experts == top_k else max(0.0, (load.effective - top_k) / (experts - top_k))


def judged(load: Balance) -> bool:
    """Whether there are enough tokens to say anything of the load."""
    return load.tokens * load.point.top_k >= LIMITS.seen * load.point.num_experts


def collapsed(load: Balance) -> bool:
    """Whether nearly everything goes to as few experts as possible."""
    return judged(load) and room(load) < LIMITS.collapsed


def skewed(load: Balance, fair: float) -> bool:
    """Whether few experts do most of the work, more than a fair lot of so many tokens explains."""
    beyond_luck = load.max_vio > LIMITS.luck * fair
    return judged(load) and beyond_luck and (room(load) < LIMITS.skewed or load.max_vio > LIMITS.skewed_max_vio)


def uneven(load: Balance, fair: float) -> bool:
    """Whether the busiest expert is clearly above an even share."""
    most = load.point.num_experts / load.point.top_k - 1
    return load.max_vio > max(min(LIMITS.even_max_vio, LIMITS.even_part * most), LIMITS.luck * fair)


def missing(load: Balance) -> bool:
    """Whether an expert was not seen that should have been."""
    return bool(load.unseen) and judged(load) and load.unseen_chance < LIMITS.surprising


def apart(shares: DomainShare) -> bool:
    """Whether two domains use some expert clearly differently; only those with an interval are compared."""
    known_D = (shares.high_DE < 1).any(1)
    low_E = shares.low_DE[known_D].max(0, initial=0.0)
    high_E = shares.high_DE[known_D].min(0, initial=1.0)
    return bool(known_D.sum() > 1 and (low_E > LIMITS.apart * high_E).any())


def keeps(repeats: Repetition) -> bool:
    """Whether consecutive tokens share their first choice clearly more often than independent ones."""
    null = repeats.first_null
    error = math.sqrt(null * (1 - null) / repeats.pairs)
    return repeats.first - null > max(LIMITS.repeats * min(null, 1 - null), LIMITS.repeats_errors * error)


def flags(stream: Stream, number: int) -> list[str]:
    """What is remarkable about a layer, in a word or two each."""
    load, fair = stream.balance[number], stream.fair_max_vio[number]
    found = ["collapsed"] if collapsed(load) else ["skewed"] if skewed(load, fair) else []
    if missing(load):
        found.append(f"{len(load.unseen)} unseen")
    if load.dropped > LIMITS.dropped:
        found.append(f"drops {percent(load.dropped)}")
    if stream.domains and apart(stream.domains[number]):
        found.append("domains")
    if stream.repetition and keeps(stream.repetition[number]) and not collapsed(load):
        found.append("repeats")
    if stream.context and stream.context[number].value > LIMITS.words:
        found.append("words")
    return found
