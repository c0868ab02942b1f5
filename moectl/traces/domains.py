"""Do domains use different experts? Shares with their intervals, and how well the path tells the domain.

Documents, not tokens, are drawn again for the intervals: tokens of a document go the same ways.
Legend: T tokens, N documents, B blocks of documents, D domains, E experts, F folds, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from moectl.bootstrap import RESAMPLES, Interval, interval, resampled_sums
from moectl.traces.statistics import Load, RoutingStatistics, by_domain
from moectl.traces.trace import Point, RoutingTrace


@dataclass(frozen=True, slots=True)
class DomainShare:
    """Which experts the domains use at one point (OLMoE, arXiv 2409.02060, section 5).

    Attributes:
        share_DE: share of the domain's tokens that use the expert; 0 for a domain without tokens.
        low_DE, high_DE: 95 % of what other documents of the domain would give, by bootstrap over (blocks of) documents;
            0 and 1 for a domain of fewer than two, which says nothing of others.
        chance: k/E, what even use gives.
        strongest: the domain and the expert whose share exceeds most the mean share in the other domains (with one
            domain: chance), and that share. None if there are no tokens.
    """

    point: Point
    share_DE: np.ndarray
    low_DE: np.ndarray
    high_DE: np.ndarray
    chance: float
    strongest: tuple[str, int, float] | None


@dataclass(frozen=True, slots=True)
class Told:
    """How often, or how surely, the domain is told, each with 95 % intervals by bootstrap over documents.

    Attributes:
        accuracy: share of cases where the right domain is the likeliest; of n that are equally so, it counts 1/n. Of
            documents its interval is Wilson's (1927): where all are right a bootstrap has nothing else to draw.
        probability: mean probability of the right domain.
        chance_accuracy: what always saying the most frequent domain gives.
        chance_probability: what saying the domains' frequencies gives: the sum of their squares.
    """

    accuracy: float
    accuracy_interval: Interval
    probability: float
    probability_interval: Interval
    chance_accuracy: float
    chance_probability: float


@dataclass(frozen=True, slots=True)
class Separation:
    """How well the first choices at all points tell the domain, of documents that were not learned from.

    Attributes:
        domains: those compared: with at least two documents.
        documents: how many, in those.
        token: told from the path of a single token.
        document: told from all tokens of a document.
    """

    domains: tuple[str, ...]
    documents: int
    token: Told
    document: Told


def specialisation(statistics: RoutingStatistics, resamples: int = RESAMPLES, seed: int = 0) -> list[DomainShare]:
    """Which share of each domain's tokens uses which expert, at every point."""
    return [_specialised(statistics, load, resamples, seed) for load in statistics.loads]


def _specialised(statistics: RoutingStatistics, load: Load, resamples: int, seed: int) -> DomainShare:
    domains, point = statistics.domains, load.point
    tokens_D = by_domain(statistics.tokens_B, statistics.domain_B, domains)
    share_DE = by_domain(load.count_BE, statistics.domain_B, domains) / tokens_D.clip(1)[:, None]
    low_DE, high_DE = np.zeros_like(share_DE), np.ones_like(share_DE)
    for domain in range(len(domains)):
        blocks = np.flatnonzero((statistics.domain_B == domain) & (statistics.tokens_B > 0))
        if len(blocks) > 1:
            values = np.vstack([load.count_BE[blocks].T, statistics.tokens_B[blocks]])
            sums_RV = resampled_sums(values, seed, resamples)
            low_DE[domain], high_DE[domain] = np.percentile(sums_RV[:, :-1] / sums_RV[:, -1:], [2.5, 97.5], axis=0)
    chance = point.top_k / point.num_experts
    return DomainShare(point, share_DE, low_DE, high_DE, chance, _strongest(share_DE, tokens_D > 0, domains, chance))


def _strongest(
    share_DE: np.ndarray, present_D: np.ndarray, domains: tuple[str, ...], chance: float
) -> tuple[str, int, float] | None:
    present = np.flatnonzero(present_D)
    if len(present) == 0:
        return None
    share_PE = share_DE[present]
    elsewhere_PE = (share_PE.sum(0) - share_PE) / (len(present) - 1) if len(present) > 1 else chance
    row, expert = np.unravel_index(np.argmax(share_PE - elsewhere_PE), share_PE.shape)
    return domains[present[row]], int(expert), float(share_PE[row, expert])


def separation(trace: RoutingTrace, seed: int = 0, folds: int = 5) -> Separation | None:
    """How well the first choices tell the domain: naive Bayes, tried on documents it was not fitted to.

    It takes the points for independent, which they are not, so its probabilities are surer than they should be; that
    it is right more often than chance is evidence all the same. Counts are smoothed by one (Laplace).

    Returns:
        None if fewer than two domains have two documents each.
    """
    tokens = trace.tokens
    documents = np.unique(tokens.document_T)
    many = np.bincount(tokens.domain_N[documents], minlength=len(tokens.domains))
    compared = np.flatnonzero(many >= 2)
    if len(compared) < 2:
        return None
    documents = documents[np.isin(tokens.domain_N[documents], compared)]
    number_D = np.full(len(tokens.domains), -1)
    number_D[compared] = np.arange(len(compared))
    domain_N = number_D[tokens.domain_N[documents]]
    fold_N = _dealt(domain_N, len(compared), folds, seed)
    keep_T = np.isin(tokens.document_T, documents)
    place_T = np.searchsorted(documents, tokens.document_T[keep_T])
    likely_TD = _log_likelihoods(trace, keep_T, fold_N[place_T], domain_N[place_T], len(compared), folds)
    likely_ND = np.zeros((len(documents), len(compared)))
    np.add.at(likely_ND, place_T, likely_TD)
    document = _told(likely_ND, fold_N, domain_N, np.arange(len(documents)), seed)
    return Separation(
        tuple(tokens.domains[domain] for domain in compared),
        len(documents),
        token=_told(likely_TD, fold_N[place_T], domain_N[place_T], place_T, seed),
        document=replace(document, accuracy_interval=_wilson(document.accuracy, len(documents))),
    )


def _wilson(share: float, cases: int) -> Interval:
    """95 % for a share of independent cases."""
    z2 = 1.959964**2 / cases
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def _dealt(domain_N: np.ndarray, domains: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each document: those of every domain are shuffled and dealt in turn."""
    generator = np.random.default_rng(seed)
    fold_N = np.zeros(len(domain_N), np.int64)
    for domain in range(domains):
        own = generator.permutation(np.flatnonzero(domain_N == domain))
        fold_N[own] = np.arange(len(own)) % folds
    return fold_N


def _log_likelihoods(
    trace: RoutingTrace, keep_T: np.ndarray, fold_T: np.ndarray, domain_T: np.ndarray, domains: int, folds: int
) -> np.ndarray:
    """Of every kept token's path under each domain [T, D], from the counts of the other folds."""
    likely_TD = np.zeros((len(fold_T), domains))
    for routed in trace.layers:
        experts = routed.point.num_experts
        first_T = routed.index_TK[keep_T, 0].astype(np.int64)
        chosen_T = first_T >= 0
        flat = ((fold_T * domains + domain_T) * experts + first_T)[chosen_T]
        count_FDE = np.bincount(flat, minlength=folds * domains * experts).reshape(folds, domains, experts)
        other_FDE = count_FDE.sum(0) - count_FDE + 1.0
        log_FED = np.log(other_FDE / other_FDE.sum(2, keepdims=True)).transpose(0, 2, 1)
        likely_TD[chosen_T] += log_FED[fold_T[chosen_T], first_T[chosen_T]]
    return likely_TD


def _told(likely_XD: np.ndarray, fold_X: np.ndarray, domain_X: np.ndarray, document_X: np.ndarray, seed: int) -> Told:
    """Of cases X (tokens or documents), from their log-likelihoods and the domains' frequencies in the other folds."""
    domains, folds = likely_XD.shape[1], int(fold_X.max()) + 1
    count_FD = np.bincount(fold_X * domains + domain_X, minlength=folds * domains).reshape(folds, domains)
    other_FD = count_FD.sum(0) - count_FD
    score_XD = likely_XD + np.log(other_FD / other_FD.sum(1, keepdims=True))[fold_X]
    score_XD -= score_XD.max(1, keepdims=True)
    best_XD = score_XD > -1e-9
    p_XD = np.exp(score_XD)
    p_XD /= p_XD.sum(1, keepdims=True)
    case_X = np.arange(len(p_XD))
    right_X, p_right_X = (best_XD / best_XD.sum(1, keepdims=True))[case_X, domain_X], p_XD[case_X, domain_X]
    sums_VN = np.stack([np.bincount(document_X, weights) for weights in (right_X, p_right_X, np.ones(len(right_X)))])
    again_RV = resampled_sums(sums_VN, seed)
    frequency_D = count_FD.sum(0) / count_FD.sum()
    return Told(
        float(right_X.mean()),
        interval(again_RV[:, 0] / again_RV[:, 2]),
        float(p_right_X.mean()),
        interval(again_RV[:, 1] / again_RV[:, 2]),
        float(frequency_D.max()),
        float(frequency_D @ frequency_D),
    )
