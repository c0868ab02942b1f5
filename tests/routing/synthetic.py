"""Routing traces with a known character, drawn from router logits: balanced, collapsed, by domain, by word, sticky.

Legend: T tokens, E experts, K chosen, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moectl.traces.statistics import statistics_of
from moectl.traces.store import Recording
from moectl.traces.trace import Point, Routed, RoutingTrace, Tokens

DOMAINS = ("code", "prose", "sums")


def tokens(
    documents: int = 24, length: int = 48, domains: Sequence[str] = DOMAINS, vocabulary: int = 97, seed: int = 0
) -> Tokens:
    """Documents of one length, dealt to the domains in turn, of random token ids."""
    generator = np.random.default_rng(seed)
    total = documents * length
    token_T = generator.integers(0, vocabulary, total).astype(np.int32)
    return Tokens(
        token_T,
        np.repeat(np.arange(documents, dtype=np.int32), length),
        np.tile(np.arange(length, dtype=np.int32), documents),
        np.zeros(total, np.uint8),
        (np.arange(documents) % max(len(domains), 1)).astype(np.int32),
        tuple(domains),
        np.roll(token_T, -1),
    )


def trace(
    of: Tokens | None = None,
    *,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    collapsed: Sequence[int] = (),
    unseen: dict[int, Sequence[int]] | None = None,
    by_domain: float = 0.0,
    by_word: float = 0.0,
    sticky: float = 0.0,
    weights: bool = True,
    scores: bool = True,
    seed: int = 1,
) -> RoutingTrace:
    """Layers that choose the top-k of Gumbel noise (fair routing) and of what the arguments add to it.

    Args:
        collapsed: layers in which every token goes to the first `top_k` experts.
        unseen: experts, by layer, that no token ever goes to.
        by_domain, by_word: added to the logits of the experts that a domain or a token id favours.
        sticky: added to the logits of the experts that the token before chose.
    """
    tokens_ = tokens() if of is None else of
    generator = np.random.default_rng(seed)
    routed = []
    for layer in range(layers):
        logit_TE = generator.gumbel(size=(len(tokens_), experts))
        expert_E = np.arange(experts)
        if by_domain:
            favoured_T = (tokens_.domain_T + layer) % max(len(tokens_.domains), 1)
            logit_TE += by_domain * (expert_E % max(len(tokens_.domains), 1) == favoured_T[:, None])
        if by_word:
            logit_TE += by_word * (expert_E == (tokens_.token_T * (layer + 3) % experts)[:, None])
        for expert in (unseen or {}).get(layer, ()):
            logit_TE[:, expert] = -30.0
        if layer in collapsed:
            logit_TE[:, :top_k] += 60.0
        if sticky:
            follows = tokens_.follows_T
            for row in range(1, len(tokens_)):
                if follows[row]:
                    logit_TE[row, np.argsort(-logit_TE[row - 1])[:top_k]] += sticky
        index_TK = np.argsort(-logit_TE, axis=1, kind="stable")[:, :top_k].astype(np.int16)
        chosen_TK = np.take_along_axis(logit_TE, index_TK.astype(np.int64), 1)
        weight_TK = np.exp(chosen_TK - chosen_TK.max(1, keepdims=True))
        point = Point(
            f"model.layers.{layer}.mlp.experts", layer, experts, top_k, score_kind="logits" if scores else "none"
        )
        routed.append(
            Routed(
                point,
                index_TK,
                (weight_TK / weight_TK.sum(1, keepdims=True)).astype(np.float16) if weights else None,
                logit_TE.astype(np.float16) if scores else None,
            )
        )
    about = {"model": "synthetic", "command": "moectl analyze-routing synthetic"}
    return RoutingTrace(tokens_, tuple(routed), about)


def recording(made: RoutingTrace | None = None, sampled: float = 1.0) -> Recording:
    """A trace with the counts over all its tokens."""
    made = trace() if made is None else made
    return Recording(statistics_of(made), made, sampled)
