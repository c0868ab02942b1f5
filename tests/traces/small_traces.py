"""Small random traces, with all that can be odd about one, and what counting by hand needs of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from moectl.traces.trace import Point, Routed, RoutingTrace, Tokens


def trace(
    index_LTK: np.ndarray | list,
    num_experts: int,
    *,
    lengths: list[int] | None = None,
    domain_N: list[int] | None = None,
    domains: tuple[str, ...] = ("all",),
    token_T: list[int] | None = None,
    predicted_T: list[int] | None = None,
    weight_LTK: np.ndarray | None = None,
    score_LTE: np.ndarray | None = None,
    score_kind: str = "logits",
    scoring: str = "softmax",
) -> RoutingTrace:
    """A trace of documents of `lengths`, one of all tokens unless given."""
    index_LTK = np.asarray(index_LTK, np.int16)
    layers, tokens, top_k = index_LTK.shape
    lengths = [tokens] if lengths is None else lengths
    domain_N = [0] * len(lengths) if domain_N is None else domain_N
    token_T = [0] * tokens if token_T is None else token_T
    described = Tokens(
        np.array(token_T, np.int32),
        np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        np.zeros(tokens, np.uint8),
        np.array(domain_N, np.int32),
        domains,
        None if predicted_T is None else np.array(predicted_T, np.int32),
    )
    kind = "none" if score_LTE is None else score_kind
    routed = []
    for number in range(layers):
        point = Point(f"layers.{number}.experts", number, num_experts, top_k, score_kind=kind, scoring=scoring)
        weight = None if weight_LTK is None else weight_LTK[number].astype(np.float16)
        score = None if score_LTE is None else score_LTE[number].astype(np.float16)
        routed.append(Routed(point, index_LTK[number], weight, score))
    return RoutingTrace(described, tuple(routed))


@st.composite
def traces(draw: st.DrawFn, least_tokens: int = 1) -> RoutingTrace:
    """Any sizes, k = 1 and k = E, one token, one document, empty documents and domains, ties, dropped choices."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda found: sum(found) >= least_tokens))
    experts = draw(st.integers(1, 6))
    top_k = draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    domains = draw(st.integers(1, 3))
    dropped = draw(st.sampled_from([0.0, 0.3]))
    kind, scoring = draw(st.sampled_from([("logits", "softmax"), ("logits", "sigmoid"), ("probabilities", "softmax")]))
    return random_trace(
        draw(st.integers(0, 2**32 - 1)),
        lengths,
        experts,
        top_k,
        domains,
        draw(st.integers(1, 3)),
        dropped,
        kind,
        scoring,
    )


def random_trace(
    seed: int,
    lengths: list[int],
    experts: int,
    top_k: int,
    domains: int = 1,
    layers: int = 2,
    dropped: float = 0.0,
    kind: str = "logits",
    scoring: str = "softmax",
) -> RoutingTrace:
    """Choices of the highest of few different scores, some of them dropped."""
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    score_LTE = generator.integers(0 if kind == "probabilities" else -3, 4, (layers, tokens, experts)).astype(float)
    score_LTE += kind == "probabilities"
    index_LTK = np.argsort(-score_LTE, axis=2, kind="stable")[..., :top_k]
    index_LTK[generator.random(index_LTK.shape) < dropped] = -1
    return trace(
        index_LTK,
        experts,
        lengths=lengths,
        domain_N=list(generator.integers(0, domains, len(lengths))),
        domains=tuple("abc"[:domains]),
        token_T=list(generator.integers(0, 4, tokens)),
        predicted_T=list(generator.integers(0, 4, tokens)),
        weight_LTK=generator.integers(1, 9, (layers, tokens, top_k)) / 8,
        score_LTE=score_LTE,
        score_kind=kind,
        scoring=scoring,
    )


def rows(traced: RoutingTrace, layer: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """For every token of a point: its document, its domain, its id and its experts as lists of numbers, -1 left out."""
    tokens = traced.tokens
    for number in range(len(tokens)):
        document = int(tokens.document_T[number])
        experts = [int(expert) for expert in traced.layers[layer].index_TK[number] if expert >= 0]
        yield document, int(tokens.domain_N[document]), int(tokens.token_T[number]), experts


def firsts(traced: RoutingTrace, layer: int) -> list[int]:
    """The first choice of every token, -1 where it was dropped."""
    return [int(row[0]) for row in traced.layers[layer].index_TK]


def home_of(expert: int, experts: int, groups: int) -> int:
    """Of neighbours together, the first groups one larger: the group that an expert is in."""
    sizes = [experts // groups + (group < experts % groups) for group in range(groups)]
    return next(group for group in range(groups) if expert < sum(sizes[: group + 1]))
