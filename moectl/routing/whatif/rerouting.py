"""One layer of a trace routed again by another router, batch by batch, beside what the model did.

Legend: T tokens, E experts, K choices, J choices of the other router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.errors import UsageError
from moectl.routers.protocol import NO_EXPERT, Context, Routing, counts
from moectl.routers.spelling import Named
from moectl.routing.whatif.asked import require_numbers
from moectl.traces.information import entropy
from moectl.traces.trace import Routed, Tokens

LONGEST = 1 << 15
"""Tokens of a document that are routed together, at least, for routers that go by sequences: more take memory."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How any router is replayed; written among its options.

    Attributes:
        training: as in training, with noise, balanced assignments and moving biases; else as in use.
        batch_tokens: that are routed together: they share capacities and assignments. Documents are not cut: a longer
            one is a batch of its own, up to 32,768 tokens of it.
    """

    training: bool = False
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        require_numbers(self)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a router did at one layer.

    Attributes:
        layer: its label.
        load_E: assignments.
        wanted, dropped: assignments before drops, and those that found no room.
        overlap: of the model's experts of a token, the share that this router sends it to as well; mean over tokens.
        chance: that overlap, had it drawn as many by a fair lot.
        moved: half the sum of the differences of normalised weights: the share of the mixture that goes elsewhere; None
            without the model's weights.
    """

    layer: str
    load_E: np.ndarray
    tokens: int
    wanted: int
    dropped: int
    overlap: float
    chance: float
    moved: float | None

    @property
    def max_vio(self) -> float:
        """By how much the largest load exceeds the mean, in means."""
        return float(self.load_E.max() / self.load_E.mean() - 1) if self.load_E.any() else 0.0

    @property
    def effective(self) -> float:
        """Experts, if they were equally loaded, of the same entropy."""
        return exp(entropy(self.load_E))


def layer(routed: Routed, tokens: Tokens, named: Named, settings: Settings, seed: int) -> Replayed:
    """What a router does at a layer, and how far it is what the model did."""
    router = _made(named, routed, tokens)
    reach = getattr(router, "reach", router.num_experts)
    generator = torch.Generator().manual_seed(seed)
    load_E = torch.zeros(reach, dtype=torch.int64)
    wanted = dropped = 0
    overlap = chance = moved = 0.0
    for rows in batches(tokens, settings.batch_tokens):
        context = Context(
            training=settings.training,
            token_T=torch.from_numpy(tokens.token_T[rows].astype(np.int64)),
            sequence_T=torch.from_numpy(np.unique(tokens.document_T[rows], return_inverse=True)[1].astype(np.int64)),
            task_T=torch.from_numpy(tokens.domain_T[rows].astype(np.int64)),
            modality_T=torch.from_numpy(tokens.domain_T[rows].astype(np.int64)),
            generator=generator,
        )
        with torch.no_grad():
            done: Routing = router.route(_logits(routed, rows), context)
        load = counts(done.index_TK, reach)
        load_E += load
        if settings.training:
            router.after_step(load)
        wanted += int((done.index_TK != NO_EXPERT).sum() + done.dropped_TK.sum())
        dropped += int(done.dropped_TK.sum())
        model = torch.from_numpy(routed.index_TK[rows].astype(np.int64))
        same_T, chance_T = _overlap(model, done.index_TK, reach)
        overlap, chance = overlap + float(same_T.sum()), chance + float(chance_T.sum())
        if routed.weight_TK is not None:
            weight_TK = torch.from_numpy(routed.weight_TK[rows].astype(np.float32))
            moved += float(_moved(model, weight_TK, done, max(reach, routed.point.num_experts)).sum())
    count = max(len(tokens), 1)
    moved_share = None if routed.weight_TK is None else moved / count
    return Replayed(
        routed.point.label, load_E.numpy(), count, wanted, dropped, overlap / count, chance / count, moved_share
    )


def own(routed: Routed) -> Replayed:
    """What the model itself did."""
    index_TK = torch.from_numpy(routed.index_TK.astype(np.int64))
    load_E = counts(index_TK, routed.point.num_experts).numpy()
    tokens, there = len(index_TK), int((index_TK != NO_EXPERT).sum())
    some = float((index_TK != NO_EXPERT).any(1).float().mean()) if tokens else 0.0
    chance = there / max(tokens, 1) / routed.point.num_experts
    places = index_TK.numel()
    moved = None if routed.weight_TK is None else 0.0
    return Replayed(routed.point.label, load_E, tokens, places, places - there, some, chance, moved)


def _made(named: Named, routed: Routed, tokens: Tokens) -> Any:
    """The router for a layer's experts; as many per token as the model's, but for those that are made for one."""
    experts = routed.point.num_experts
    kind = named.entry.load()
    defaults = {"tasks": len(tokens.domains), "modalities": len(tokens.domains)}
    if kind.Options().top_k > 1:
        defaults["top_k"] = min(routed.point.top_k, experts)
    try:
        return kind(None, experts, named.options(**defaults)).eval()
    except ValueError as error:
        raise UsageError(
            f"The router {named.text} cannot be replayed on {experts} experts.", str(error), "Change its options."
        ) from error


def batches(tokens: Tokens, most: int) -> Iterator[slice]:
    """Tokens that are routed together: documents one after another while they fit; a longer one by itself.

    One of more than LONGEST tokens, and `most`, is cut.
    """
    starts = np.flatnonzero(np.diff(tokens.document_T, prepend=-1)).tolist()
    first = 0
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if end - first > most and start > first:
            yield slice(first, start)
            first = start
        while end - first > max(most, LONGEST):
            yield slice(first, first + max(most, LONGEST))
            first += max(most, LONGEST)
    if starts:
        yield slice(first, len(tokens))


def cut_documents(tokens: Tokens, most: int) -> int:
    """How many documents `batches` cuts."""
    return int((np.bincount(tokens.document_T) > max(most, LONGEST)).sum()) if len(tokens) else 0


def _logits(routed: Routed, rows: slice) -> Tensor:
    """Scores as logits [T, E]: of probabilities their logarithms, or log-odds where each stands for itself."""
    assert routed.score_TE is not None
    score_TE = torch.from_numpy(np.asarray(routed.score_TE[rows], np.float32))
    if routed.point.score_kind == "logits":
        return score_TE
    if routed.point.scoring == "sigmoid":
        return torch.logit(score_TE, eps=1e-6)
    return score_TE.clamp(min=1e-9).log()


def _overlap(model_TK: Tensor, index_TJ: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Which share of the model's experts of a token this router chose too, and what as many lots would have [T]."""
    there_TK = model_TK != NO_EXPERT
    same_TK = (model_TK[:, :, None] == index_TJ[:, None, :]).any(2) & there_TK
    chosen_T = (index_TJ != NO_EXPERT).sum(1)
    some_T = there_TK.any(1)
    return same_TK.sum(1) / there_TK.sum(1).clamp(min=1), chosen_T / reach * some_T


def _moved(model_TK: Tensor, weight_TK: Tensor, done: Routing, experts: int) -> Tensor:
    """Half the sum of absolute differences of weights, each row normalised to 1 [T]; a row without any is nothing."""
    parts = []
    for index_TK, given_TK in ((model_TK, weight_TK), (done.index_TK, done.weight_TK)):
        share_TE = torch.zeros(len(index_TK), experts)
        kept_TK = given_TK.float().abs() * (index_TK != NO_EXPERT)
        share_TE.scatter_add_(1, index_TK.clamp(min=0), kept_TK)
        parts.append(share_TE / share_TE.sum(1, keepdim=True).clamp(min=1e-12))
    return (parts[0] - parts[1]).abs().sum(1) / 2
