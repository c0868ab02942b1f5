"""How many experts a batch reads while decoding: where a sparse model stops being sparse.

B documents decoded at once share the experts that they have in common, and so do B consecutive tokens that are verified
at once (speculative decoding). Legend: T tokens, K choices, E experts, B tokens of a step, S steps, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moectl.compiled import compiled
from moectl.report.output import Cell
from moectl.routing.whatif.asked import computing, mean, require, require_numbers, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.traces.trace import DECODE, Routed, RoutingTrace, Tokens

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        batch: documents decoded at once; fewer if the trace has fewer.
        draft: consecutive tokens of one document that are verified at once.
        expert_mb: of one expert's weights, in MB (10^6 bytes).
        seed: of which documents are decoded together.
    """

    batch: int = 32
    draft: int = 4
    expert_mb: float = 12.6
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self)


def together(tokens: Tokens, at_X: np.ndarray, batch: int, seed: int) -> np.ndarray:
    """The tokens of every step of `batch` documents [S, B], of the tokens `at_X`.

    Documents queue in a random order, cut into as many equal parts as are decoded at once: where a document ends, the
    next one begins, as in continuous batching. Too few documents make no step.
    """
    document_X = tokens.document_T[at_X]
    if len(np.unique(document_X)) < batch:
        return np.empty((0, batch), np.int64)
    rank_N = np.random.default_rng(seed).permutation(len(tokens.domain_N))
    order_X = at_X[np.argsort(rank_N[document_X], kind="stable")]
    steps = len(order_X) // batch
    return np.ascontiguousarray(order_X[: steps * batch].reshape(batch, steps).T)


def consecutive(tokens: Tokens, at_X: np.ndarray, batch: int) -> np.ndarray:
    """The tokens of every window of `batch` consecutive ones of a document [S, B]; windows do not overlap."""
    if batch > len(at_X):
        return np.empty((0, batch), np.int64)
    document_X = tokens.document_T[at_X]
    start_X = np.searchsorted(document_X, document_X)
    size_X = np.searchsorted(document_X, document_X, side="right") - start_X
    within_X = np.arange(len(at_X)) - start_X
    first_S = np.flatnonzero((within_X % batch == 0) & (within_X + batch <= size_X))
    return np.asarray(at_X[first_S[:, None] + np.arange(batch)], np.int64)


def distinct(index_TK: np.ndarray, step_SB: np.ndarray, experts: int) -> float | None:
    """How many experts a step reads, on average; None without a step."""
    if not len(step_SB):
        return None
    return float(_distinct(index_TK, step_SB, experts) / len(step_SB))


@compiled
def _distinct(index_TK: np.ndarray, step_SB: np.ndarray, experts: int) -> int:
    last_E, met = np.full(experts, -1), 0
    for step in range(len(step_SB)):
        for token in step_SB[step]:
            for k in range(index_TK.shape[1]):
                expert = index_TK[token, k]
                if expert >= 0 and last_E[expert] != step:
                    last_E[expert] = step
                    met += 1
    return met


def by_chance(use_E: np.ndarray, batch: int) -> float:
    """How many experts `batch` independent tokens read, each using expert e with the probability use_E[e]."""
    return float((1 - (1 - use_E) ** batch).sum())


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Experts and bytes that a step reads, for batches and for drafts."""
    require(trace, "coalescing")
    tokens = trace.tokens
    decoded_T = tokens.phase_T == DECODE
    at_X = np.flatnonzero(decoded_T if decoded_T.any() else np.ones(len(tokens), bool))
    batch = min(options.batch, len(np.unique(tokens.document_T[at_X])))
    asked, drafted = together(tokens, at_X, batch, options.seed), consecutive(tokens, at_X, options.draft)
    sizes = sorted({size for size in BATCHES if size <= len(at_X)})
    steps = [(together(tokens, at_X, size, options.seed), consecutive(tokens, at_X, size)) for size in sizes]
    rows: list[tuple[Cell, ...]] = []
    curves = []
    for routed in trace.layers:
        index_TK, experts = computing(routed)
        use_E = _use(index_TK[at_X], experts)
        even_E = np.full(experts, use_E.mean())
        read, drafts = distinct(index_TK, asked, experts), distinct(index_TK, drafted, experts)
        assert read is not None, "as many documents as there are make a step"
        rows.append(
            (
                *(routed.point.label, read, by_chance(even_E, batch), by_chance(use_E, batch), read / experts),
                *(read * options.expert_mb, drafts, by_chance(even_E, options.draft)),
            )
        )
        curves.append(
            [
                tuple(
                    None if value is None else value / experts
                    for value in (
                        *(distinct(index_TK, step_SB, experts) for step_SB in both),
                        *(by_chance(each_E, size) for each_E in (even_E, use_E)),
                    )
                )
                for size, both in zip(sizes, steps, strict=True)
            ]
        )
    columns = (
        *("layer", "experts read", "by chance", "same loads", "share of the experts", "MB a step"),
        *(f"by {options.draft} consecutive tokens", "those by chance"),
    )
    total = with_mean(rows)[-1]
    domains = _domains(trace, at_X, options)
    megabytes = sum(float(row[5] or 0) for row in rows)
    several = f"{options.draft} consecutive tokens read" if options.draft > 1 else "A token reads"
    who = "One document decoded alone reads" if batch == 1 else f"{batch} documents decoded at once read"
    headline = (
        f"{who} {total[1]:.1f} experts a layer, {total[4]:.0%} of them, where even "
        f"random routing would read {total[2]:.1f}, and independent tokens with the loads of the trace {total[3]:.1f}: "
        f"{megabytes / 1000:.3g} GB a step at {options.expert_mb:g} MB an expert"
    )
    if total[6] is not None:
        headline += f". {several} {total[6]:.1f} (random routing: {total[7]:.1f})"
    return Finding(
        "coalescing",
        headline + ".",
        columns,
        (*with_mean(rows), ("all layers", *[None] * 4, megabytes, None, None)),
        (_curve(sizes, curves),),
        _assumptions(bool(decoded_T.any()), options, batch),
        {"batch": batch, "domains": domains, "gb a step": megabytes / 1000},
    )


def _use(index_XK: np.ndarray, experts: int) -> np.ndarray:
    """Share of the tokens that use each expert [E]."""
    return np.bincount(index_XK[index_XK >= 0], minlength=experts) / len(index_XK)


def _domains(trace: RoutingTrace, at_X: np.ndarray, options: Options) -> dict[str, dict[str, float]]:
    """Experts read by documents of one domain alone, as many at once for each domain, mean over layers."""
    tokens, found = trace.tokens, {}
    domain_X = tokens.domain_T[at_X]
    there = np.unique(domain_X)
    documents = [len(np.unique(tokens.document_T[at_X[domain_X == domain]])) for domain in there]
    batch = min(options.batch, *documents)
    for domain in there:
        step_SB = together(tokens, at_X[domain_X == domain], batch, options.seed)
        read = mean([distinct(*_two(routed, step_SB)) for routed in trace.layers])
        found[tokens.domains[domain]] = {"batch": batch, "experts read": float(read or 0)}
    return found


def _two(routed: Routed, step_SB: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    index_TK, experts = computing(routed)
    return index_TK, step_SB, experts


def _curve(sizes: list[int], curves: list[list[tuple[float | None, ...]]]) -> Curve:
    names = ("documents at once", "consecutive tokens", "random routing", "independent, same loads")
    lines = {
        name: [mean([layer[at][line] for layer in curves]) for at in range(len(sizes))]
        for line, name in enumerate(names)
    }
    return Curve(
        "Experts that a step reads", "tokens of a step", "share of the layer's experts", sizes, lines,
        chance="random routing", percent=True,
    )  # fmt: skip


def _assumptions(decoded: bool, options: Options, batch: int) -> tuple[str, ...]:
    said = [
        "Tokens that were decoded." if decoded else "All tokens, as if each had been decoded: the trace is of prompts.",
        "Where a document ends, the next one takes its place in the batch; their order is drawn with a seed.",
        "Chance: E (1 - (1 - k/E)^B).",
        f"Every expert that is read is read once a step, {options.expert_mb:g} MB of it.",
    ]
    if batch < options.batch:
        said.append(f"{batch} documents at once, not {options.batch}: the trace has no more.")
    return tuple(said)
