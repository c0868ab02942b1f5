"""What is counted over all tokens, however many: bounded in memory, exact, and enough for balance and domains.

Documents are dealt to at most `BLOCKS` blocks per domain, so that intervals can be bootstrapped over (blocks of)
documents without keeping a count for each. Legend: B blocks, E experts, L points, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moectl.errors import InputError
from moectl.traces.trace import Point, RoutingTrace

BLOCKS = 128
"""The most blocks of documents in a domain."""

MARGIN_EDGES = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 31)])
"""Of the histogram of margins: from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Sums over the tokens of one point, from the router's scores.

    Attributes:
        tokens: how many.
        probability_E: of each expert, float64.
        entropy: of the distribution over experts, in nats.
        z: the squares of logsumexp (ST-MoE, arXiv 2202.08906, equation 5); NaN where the scores are no logits.
        margin_M: tokens by the difference between the K-th and the next highest probability, on MARGIN_EDGES, int64.
    """

    tokens: int
    probability_E: np.ndarray
    entropy: float
    z: float
    margin_M: np.ndarray

    def __add__(self, other: Scored) -> Scored:
        return Scored(
            self.tokens + other.tokens,
            self.probability_E + other.probability_E,
            self.entropy + other.entropy,
            self.z + other.z,
            self.margin_M + other.margin_M,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """Counts at one point.

    Attributes:
        count_BE: assignments to each expert from each block, int64.
        first_BE: tokens whose first choice each expert was, int64.
        weight_BE: what their outputs were multiplied with, summed, float64; None if not recorded.
        dropped: assignments that went nowhere.
        scored: sums over the router's scores; None if not recorded.
    """

    point: Point
    count_BE: np.ndarray
    first_BE: np.ndarray
    weight_BE: np.ndarray | None = None
    dropped: int = 0
    scored: Scored | None = None

    @property
    def count_E(self) -> np.ndarray:
        """Assignments to each expert [E]."""
        return np.asarray(self.count_BE.sum(0))

    def __add__(self, other: Load) -> Load:
        weight = None
        if self.weight_BE is not None and other.weight_BE is not None:
            weight = self.weight_BE + other.weight_BE
        return Load(
            self.point,
            self.count_BE + other.count_BE,
            self.first_BE + other.first_BE,
            weight,
            self.dropped + other.dropped,
            self.scored + other.scored if self.scored and other.scored else None,
        )


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """Counts over all tokens of a run.

    Attributes:
        domains: their names.
        domain_B: the domain of each block, int32.
        tokens_B: tokens of each block, int64.
        documents: how many there were.
        loads: of every point, in the order of the layers.
        max_vio_batch: for every point the mean over batches of MaxVio (arXiv 2408.15664); empty if not recorded.
    """

    domains: tuple[str, ...]
    domain_B: np.ndarray
    tokens_B: np.ndarray
    documents: int
    loads: tuple[Load, ...]
    max_vio_batch: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.tokens_B.sum())

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Both together: what several processes counted of the same model and domains.

        Raises:
            InputError: they are not of the same points and blocks.
        """
        same = self.domains == other.domains and np.array_equal(self.domain_B, other.domain_B)
        if not same or [load.point for load in self.loads] != [load.point for load in other.loads]:
            raise InputError(
                "Two parts of a routing run are not of the same model and domains.",
                "Their counts cannot be added.",
                "Give all processes the same command.",
            )
        tokens = self.tokens, other.tokens
        batch = tuple(
            float(np.average(pair, weights=tokens))
            for pair in zip(self.max_vio_batch, other.max_vio_batch, strict=True)
        )
        return replace(
            self,
            tokens_B=self.tokens_B + other.tokens_B,
            documents=self.documents + other.documents,
            loads=tuple(mine + theirs for mine, theirs in zip(self.loads, other.loads, strict=True)),
            max_vio_batch=batch if sum(tokens) else self.max_vio_batch,
        )


def blocks_of(domain_N: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """The block of each document [N] and the domain of each block [B]: documents of a domain are dealt in turn."""
    number_N = np.zeros(len(domain_N), np.int64)
    for domain in range(domains):
        of_domain = domain_N == domain
        number_N[of_domain] = np.arange(of_domain.sum()) % BLOCKS
    return domain_N * BLOCKS + number_N, np.repeat(np.arange(domains, dtype=np.int32), BLOCKS)


def counted(index_TK: np.ndarray, block_T: np.ndarray, num_experts: int, num_blocks: int) -> np.ndarray:
    """How often each block of tokens went to each expert [B, E], int64; places without an expert count nowhere."""
    flat = (block_T[:, None] * num_experts + index_TK)[index_TK >= 0]
    return np.bincount(flat, minlength=num_blocks * num_experts).reshape(num_blocks, num_experts)


def probabilities(point: Point, score_TE: np.ndarray) -> np.ndarray:
    """What a point's scores [T, E] make of each expert, float64 [T, E]: rows sum to 1, or to 0 where nothing is likely.

    Raises:
        InputError: a score is NaN or infinite.
    """
    score_TE = np.asarray(score_TE, np.float64)
    if not np.isfinite(score_TE).all():
        raise InputError(
            f"{point.name}: the router's scores hold NaN or infinity, first at token "
            f"{int(np.argmin(np.isfinite(score_TE).all(1)))}.",
            "What it chose means nothing.",
            "Check the model's weights, or run it in float32.",
        )
    if point.score_kind != "logits":
        p_TE = score_TE
    elif point.scoring == "softmax":
        p_TE = np.exp(score_TE - score_TE.max(1, keepdims=True))
    else:
        p_TE = np.exp(-np.logaddexp(0, -score_TE))
    return np.asarray(p_TE / p_TE.sum(1, keepdims=True).clip(1e-300))


def margins(p_TE: np.ndarray, top_k: int) -> np.ndarray:
    """By how much the last expert that is chosen leads the first that is not [T]; `top_k` below the experts' number."""
    at = p_TE.shape[1] - top_k
    ordered = np.partition(p_TE, (at - 1, at), axis=1)
    return np.asarray(ordered[:, at] - ordered[:, at - 1])


def require_weights(point: Point, weight_X: np.ndarray) -> None:
    """Check combine weights, or sums of them.

    Raises:
        InputError: one is NaN or infinite.
    """
    if not np.isfinite(weight_X).all():
        raise InputError(
            f"{point.name}: the combine weights hold NaN or infinity.",
            "What the experts' outputs were multiplied with means nothing.",
            "Check the model's weights, or run it in float32.",
        )


def scored(point: Point, score_TE: np.ndarray) -> Scored:
    """The sums of one point's scores [T, E].

    Raises:
        InputError: a score is NaN or infinite.
    """
    p_TE = probabilities(point, score_TE)
    logits = point.score_kind == "logits"
    z = float((_log_sums(np.asarray(score_TE, np.float64)) ** 2).sum()) if logits else float("nan")
    entropy = float(-(p_TE * np.log(p_TE.clip(1e-300))).sum())
    margin_M = np.zeros(len(MARGIN_EDGES) - 1, np.int64)
    if point.top_k < p_TE.shape[1]:
        margin_M = np.histogram(np.clip(margins(p_TE, point.top_k), 0, 1), MARGIN_EDGES)[0]
    return Scored(len(p_TE), p_TE.sum(0), entropy, z, margin_M)


def _log_sums(score_TE: np.ndarray) -> np.ndarray:
    largest_T1 = score_TE.max(1, keepdims=True)
    return np.asarray(largest_T1 + np.log(np.exp(score_TE - largest_T1).sum(1, keepdims=True)))


def statistics_of(trace: RoutingTrace) -> RoutingStatistics:
    """The counts over all tokens of a trace."""
    tokens = trace.tokens
    block_N, domain_B = blocks_of(tokens.domain_N, len(tokens.domains))
    block_T = block_N[tokens.document_T]
    loads = []
    for routed in trace.layers:
        point = routed.point
        weight_BE = None
        if routed.weight_TK is not None:
            weight_BE = np.zeros((len(domain_B), point.num_experts))
            chosen = routed.index_TK >= 0
            blocks_TK = np.broadcast_to(block_T[:, None], chosen.shape)
            weight = routed.weight_TK.astype(np.float64)
            np.add.at(weight_BE, (blocks_TK[chosen], routed.index_TK[chosen]), weight[chosen])
        loads.append(
            Load(
                point,
                counted(routed.index_TK, block_T, point.num_experts, len(domain_B)),
                counted(routed.index_TK[:, :1], block_T, point.num_experts, len(domain_B)),
                weight_BE,
                int((routed.index_TK < 0).sum()),
                None if routed.score_TE is None else scored(point, routed.score_TE),
            )
        )
    return RoutingStatistics(
        tokens.domains,
        domain_B,
        np.bincount(block_T, minlength=len(domain_B)),
        len(np.unique(tokens.document_T)),
        tuple(loads),
    )


def by_domain(values_BX: np.ndarray, domain_B: np.ndarray, domains: Sequence[str]) -> np.ndarray:
    """Sums over the blocks of each domain [D, ...]."""
    sums = np.zeros((len(domains), *values_BX.shape[1:]), values_BX.dtype)
    np.add.at(sums, domain_B, values_BX)
    return sums
