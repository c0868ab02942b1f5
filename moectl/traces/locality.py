"""Does the next token go the same way, and does the token alone decide the way?

Legend: T tokens, P pairs of tokens of which one directly follows the other, K experts per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moectl.traces.information import beyond_chance, entropy_of, log_choose
from moectl.traces.trace import Point, Routed, RoutingTrace


@dataclass(frozen=True, slots=True)
class Repetition:
    """How often a token takes an expert of the token before it (Mixtral, arXiv 2401.04088, table 5).

    Attributes:
        pairs: how many tokens directly follow another.
        first: share of them whose first choice is the same; a dropped choice never is.
        any: share of them that have any expert in common.
        first_null: what `first` would be with the same loads and independent tokens: the sum of their squares. Of
            several domains it is the mean over pairs of each domain's own: that neighbours share a domain is not that
            they share experts.
        first_fair: and with even loads: 1/E.
        any_null: what `any` would be with even loads and independent tokens: 1 - C(E-k, k) / C(E, k).
        any_shuffled: and with the loads that were measured: every token beside one of its domain, drawn at random.
        domains: the same of each domain that has pairs; empty in those.
    """

    point: Point
    pairs: int
    first: float
    any: float
    first_null: float
    first_fair: float
    any_null: float
    any_shuffled: float
    domains: Mapping[str, Repetition] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ContextIndependence:
    """How far the token id alone decides the first choice (OpenMoE, arXiv 2402.01739, calls it so).

    Mutual information is estimated by counting, which finds some where there is none; so what it finds after a shuffle
    is 0 on these scales, and all that is left to know is 1 (Vinh, Epps and Bailey, JMLR 11, 2010).

    Attributes:
        value: of the entropy of the first choice, what the token id tells: 1 for routing by a table of ids.
        gain: of what the id leaves open, what the token before it tells. Most pairs of ids are rare, so it is an
            underestimate in a short trace.
        information: of the first choice and the token id, in nats, as counted.
        null: the same after the ids were shuffled over the tokens.
        entropy: of the first choice, in nats.
    """

    point: Point
    value: float
    gain: float
    information: float
    null: float
    entropy: float


def repetition(trace: RoutingTrace, seed: int = 0) -> list[Repetition]:
    """How often consecutive tokens share experts, at every point; nothing if no token follows another."""
    tokens = trace.tokens
    now_P = np.flatnonzero(tokens.follows_T)
    if len(now_P) == 0:
        return []
    generator = np.random.default_rng(seed)
    members = {name: tokens.domain_T == domain for domain, name in enumerate(tokens.domains)}
    parts = {name: (mask_T, now_P[mask_T[now_P]]) for name, mask_T in members.items()}
    found = []
    for routed in trace.layers:
        domains = {
            name: _repeats(routed, mask_T, own_P, generator) for name, (mask_T, own_P) in parts.items() if len(own_P)
        }
        found.append(_together(domains))
    return found


def _together(domains: Mapping[str, Repetition]) -> Repetition:
    parts = list(domains.values())
    pairs = [part.pairs for part in parts]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=pairs))

    return replace(
        parts[0],
        pairs=sum(pairs),
        first=mean([part.first for part in parts]),
        any=mean([part.any for part in parts]),
        first_null=mean([part.first_null for part in parts]),
        any_shuffled=mean([part.any_shuffled for part in parts]),
        domains=domains,
    )


def _repeats(routed: Routed, mask_T: np.ndarray, now_P: np.ndarray, generator: np.random.Generator) -> Repetition:
    point, index_TK = routed.point, routed.index_TK
    experts, top_k = point.num_experts, point.top_k
    now_PK, before_PK = index_TK[now_P], index_TK[now_P - 1]
    first_T = index_TK[mask_T, 0]
    share_E = np.bincount(first_T[first_T >= 0], minlength=experts) / len(first_T)
    return Repetition(
        point,
        len(now_P),
        first=float(((now_PK[:, 0] == before_PK[:, 0]) & (now_PK[:, 0] >= 0)).mean()),
        any=float(_meet(now_PK, before_PK).mean()),
        first_null=float(share_E @ share_E),
        first_fair=1 / experts,
        any_null=any_fair(experts, top_k),
        any_shuffled=float(_meet(now_PK, index_TK[generator.permutation(np.flatnonzero(mask_T))[: len(now_P)]]).mean()),
    )


def any_fair(num_experts: int, top_k: int) -> float:
    """The chance that two independent fair choices of `top_k` experts meet: 46.43 % for 2 of 8."""
    if 2 * top_k > num_experts:
        return 1.0
    return 1 - math.exp(log_choose(num_experts - top_k, top_k) - log_choose(num_experts, top_k))


def _meet(one_PK: np.ndarray, other_PK: np.ndarray) -> np.ndarray:
    """Whether the two of each pair have an expert in common [P]."""
    meet_P = np.zeros(len(one_PK), bool)
    for one_P in one_PK.T:
        for other_P in other_PK.T:
            meet_P |= (one_P == other_P) & (one_P >= 0)
    return meet_P


def context_independence(trace: RoutingTrace, seed: int = 0) -> list[ContextIndependence]:
    """What the token id, and the one before it, tell of the first choice, at every point.

    Returns:
        Nothing if the ids were not recorded, or if there are no tokens.
    """
    tokens = trace.tokens
    if len(tokens) == 0 or tokens.token_T.max() < 0:
        return []
    generator = np.random.default_rng(seed)
    id_T = tokens.token_T.astype(np.int64) + 1
    shuffled_T = generator.permutation(id_T)
    follows_T = tokens.follows_T
    id_P, before_P = id_T[follows_T], id_T[np.flatnonzero(follows_T) - 1]
    # Dealt anew among the tokens of the same id, so that only what it adds to the id is lost.
    mixed_P = np.empty_like(before_P)
    mixed_P[np.argsort(id_P, kind="stable")] = before_P[np.lexsort((generator.random(len(id_P)), id_P))]
    ids = int(id_T.max()) + 1
    pair_P, mixed_pair_P = id_P * ids + before_P, id_P * ids + mixed_P
    found = []
    for routed in trace.layers:
        first_T = routed.index_TK[:, 0].astype(np.int64)
        first_P = first_T[follows_T]
        most = entropy_of(first_T)
        information, null = _told(first_T, id_T), _told(first_T, shuffled_T)
        gain = beyond_chance(_told(first_P, pair_P), _told(first_P, mixed_pair_P), entropy_of(first_P))
        found.append(
            ContextIndependence(routed.point, beyond_chance(information, null, most), gain, information, null, most)
        )
    return found


def _told(first_T: np.ndarray, label_T: np.ndarray) -> float:
    """What a label tells of the first choice, in nats; none (-1) is a choice of its own."""
    joint_T = label_T * (int(first_T.max(initial=0)) + 2) + first_T + 1
    return max(0.0, entropy_of(first_T) + entropy_of(label_T) - entropy_of(joint_T))
