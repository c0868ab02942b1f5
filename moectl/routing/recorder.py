"""What is kept of a run: counts over all tokens, and the trace of as many whole documents as a byte cap allows.

Legend: R rows of a forward pass, T of them that are tokens, K experts per token, E experts, B blocks of documents,
N documents, S tokens of the trace, L points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.errors import InputError
from moectl.routing.capture import Seen
from moectl.routing.score_sums import ScoreSums
from moectl.routing.tap import Tap
from moectl.text import escape
from moectl.traces.statistics import Load, RoutingStatistics, Scored, blocks_of
from moectl.traces.store import Recording, index_dtype
from moectl.traces.trace import PREFILL, Routed, RoutingTrace, Tokens

PADDING = -1
"""In place of a document's number in rows that are no token of one."""

_FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Which token each row [R] of a forward pass is, flattened as the model flattens its batch.

    Attributes:
        document_R: its document, PADDING for rows that are not counted.
        position_R: its place there.
        token_R: its id.
        phase: PREFILL or DECODE.
    """

    document_R: np.ndarray
    position_R: np.ndarray
    token_R: np.ndarray
    phase: int = PREFILL


def sampled_documents(length_N: np.ndarray, bytes_per_token: int, most_bytes: int, seed: int) -> np.ndarray:
    """Which documents [N] a trace of at most so many bytes has: whole ones, in the order of a hash, at least one."""
    order_N = sorted(range(len(length_N)), key=lambda number: sha256(f"{seed} {number}".encode()).digest())
    kept_N = np.zeros(len(length_N), bool)
    fits = np.cumsum(length_N[order_N]) * bytes_per_token <= most_bytes
    kept_N[order_N[: max(1, int(fits.sum()))]] = True
    return kept_N


class Recorder:
    """Takes what was seen of one stream of tokens, forward pass by forward pass, in any order of documents.

    `length_N` is how many tokens of each document come here (0 for those that another process has), and `kept_N` says
    which documents the trace has.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        domains: Sequence[str],
        domain_N: np.ndarray,
        length_N: np.ndarray,
        *,
        kept_N: np.ndarray,
        scores: bool = True,
        predicted: bool = False,
    ) -> None:
        self._taps, self._scores = tuple(taps), scores
        self._domains, self._domain_N = tuple(domains), domain_N.astype(np.int32)
        self._block_N, self._domain_B = blocks_of(domain_N, len(self._domains))
        self._documents = int((length_N > 0).sum())
        blocks, points = len(self._domain_B), [tap.point for tap in taps]
        self._tokens_B = np.zeros(blocks, np.int64)
        self._count = [np.zeros((blocks, point.num_experts), np.int64) for point in points]
        self._first = [np.zeros((blocks, point.num_experts), np.int64) for point in points]
        self._weight = [np.zeros((blocks, point.num_experts)) for point in points]
        self._dropped = [0] * len(points)
        self._max_vio = np.zeros(len(points))
        self._sums: dict[int, ScoreSums] = {}

        kept_length_N = np.where(kept_N, length_N, 0)
        self._start_N = np.where(kept_N, np.cumsum(kept_length_N) - kept_length_N, PADDING)
        size = int(kept_length_N.sum())
        self._tokens = Tokens(
            np.zeros(size, np.int32),
            np.repeat(np.arange(len(length_N), dtype=np.int32), kept_length_N),
            np.zeros(size, np.int32),
            np.zeros(size, np.uint8),
            self._domain_N,
            self._domains,
            np.zeros(size, np.int32) if predicted else None,
        )
        self._layers = tuple(
            Routed(
                point,
                np.zeros((size, point.top_k), index_dtype(point.num_experts)),
                np.zeros((size, point.top_k), np.float16),
                np.zeros((size, point.num_experts), np.float16) if scores and tap.scores is not None else None,
            )
            for tap, point in zip(taps, points, strict=True)
        )

    def add(self, seen: Sequence[Seen], rows: Rows, predicted_R: Tensor | None = None) -> None:
        """Count one forward pass; `predicted_R` is the token that the model found most likely after each row.

        Raises:
            InputError: the rows are not as many as were seen, or scores are NaN or infinite.
        """
        counted_R = rows.document_R != PADDING
        every = bool(counted_R.all())
        document_T = rows.document_R if every else rows.document_R[counted_R]
        if not len(document_T):
            return
        index, weight = self._fetched(seen, rows)
        blocks, block_T = np.unique(self._block_N[document_T], return_inverse=True)
        place_T = self._place(rows, counted_R, predicted_R)
        kept_T = place_T >= 0
        place_S = place_T[kept_T]
        self._tokens_B[blocks] += np.bincount(block_T, minlength=len(blocks))
        finite: dict[int, Tensor] = {}
        at_T = None if every else torch.from_numpy(np.flatnonzero(counted_R))
        for number, (tap, each) in enumerate(zip(self._taps, seen, strict=True)):
            index_TK, weight_TK = (part if every else part[counted_R] for part in (index[number], weight[number]))
            if not tap.ordered:
                index_TK, weight_TK = _by_weight(index_TK, weight_TK)
            self._count_one(number, blocks, block_T, index_TK, weight_TK)
            layer = self._layers[number]
            layer.index_TK[place_S] = index_TK[kept_T]
            assert layer.weight_TK is not None
            layer.weight_TK[place_S] = weight_TK[kept_T]
            if layer.score_TE is not None:
                assert each.score_TE is not None, "a checked tap has scores in every pass, or in none"
                top_is_known = tap.point.selects and not (index_TK < 0).any()
                score_TE, top_TK = each.score_TE, each.index_TK
                if at_T is not None:
                    score_TE, top_TK = (part[at_T.to(part.device)] for part in (score_TE, top_TK))
                if number not in self._sums:
                    self._sums[number] = ScoreSums(tap.point, score_TE.device)
                finite[number] = self._sums[number].add(score_TE, top_TK if top_is_known else None)
                if len(place_S):
                    kept_TE = score_TE if kept_T.all() else score_TE[torch.from_numpy(kept_T).to(score_TE.device)]
                    self._keep_scores(layer, place_S, kept_TE)
        self._refuse_non_finite(finite)

    def recording(self, about: Mapping[str, Any]) -> Recording:
        """Everything so far; the recorder is not used again."""
        tokens = int(self._tokens_B.sum())
        loads = tuple(
            Load(
                tap.point,
                self._count[number],
                self._first[number],
                self._weight[number],
                self._dropped[number],
                self._total(number, tap),
            )
            for number, tap in enumerate(self._taps)
        )
        statistics = RoutingStatistics(
            self._domains,
            self._domain_B,
            self._tokens_B,
            self._documents,
            loads,
            tuple((self._max_vio / max(tokens, 1)).tolist()),
        )
        return Recording(
            statistics, RoutingTrace(self._tokens, self._layers, about), len(self._tokens) / max(tokens, 1)
        )

    def _fetched(self, seen: Sequence[Seen], rows: Rows) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Index and weight of every point on the host, in one copy each."""
        shapes = [each.index_TK.shape for each in seen]
        if any(shape[0] != len(rows.document_R) for shape in shapes):
            raise InputError(
                f"The experts of {escape(self._taps[0].point.name)} were given {shapes[0][0]} rows, and the model "
                f"{len(rows.document_R)} tokens.",
                "Which row is which token is not known.",
                "Give an adapter (an entry point of the group `moectl.routing_adapters`) that puts its rows in place.",
            )
        device = seen[0].index_TK.device
        whole = np.cumsum([shape.numel() for shape in shapes])[:-1]
        index = torch.cat([each.index_TK.to(device, torch.int32).flatten() for each in seen]).cpu().numpy()
        weight = torch.cat([each.weight_TK.to(device, torch.float32).flatten() for each in seen]).cpu().numpy()
        return (
            [part.reshape(shape) for part, shape in zip(np.split(index, whole), shapes, strict=True)],
            [part.reshape(shape) for part, shape in zip(np.split(weight, whole), shapes, strict=True)],
        )

    def _place(self, rows: Rows, counted_R: np.ndarray, predicted_R: Tensor | None) -> np.ndarray:
        """Where each token stands in the trace [T], -1 for nowhere; notes its id, position and phase there."""
        document_T, position_T = rows.document_R[counted_R], rows.position_R[counted_R]
        place_T = np.where(self._start_N[document_T] < 0, -1, self._start_N[document_T] + position_T)
        kept_T = place_T >= 0
        place_S = place_T[kept_T]
        self._tokens.token_T[place_S] = rows.token_R[counted_R][kept_T]
        self._tokens.position_T[place_S] = position_T[kept_T]
        self._tokens.phase_T[place_S] = rows.phase
        if self._tokens.predicted_T is not None and predicted_R is not None and len(place_S):
            self._tokens.predicted_T[place_S] = predicted_R.cpu().numpy()[counted_R][kept_T]
        return place_T

    def _keep_scores(self, layer: Routed, place_S: np.ndarray, score_SE: Tensor) -> None:
        assert layer.score_TE is not None
        half_SE = score_SE.float().clamp(-_FLOAT16_LARGEST, _FLOAT16_LARGEST).half()
        layer.score_TE[place_S] = half_SE.cpu().numpy()

    def _total(self, number: int, tap: Tap) -> Scored | None:
        """Sums of no tokens where this process had none, so that those of others can be added."""
        if not self._scores or tap.scores is None:
            return None
        return self._sums.get(number, ScoreSums(tap.point, torch.device("cpu"))).total()

    def _count_one(
        self, number: int, blocks: np.ndarray, block_T: np.ndarray, index_TK: np.ndarray, weight_TK: np.ndarray
    ) -> None:
        experts, size = self._taps[number].point.num_experts, len(blocks) * self._taps[number].point.num_experts
        place_TK = block_T[:, None] * experts + index_TK
        first_T, place, weight = place_TK[:, 0], place_TK.ravel(), weight_TK.ravel()
        chosen_TK = index_TK >= 0
        if not chosen_TK.all():
            self._dropped[number] += int((~chosen_TK).sum())
            first_T, place, weight = first_T[chosen_TK[:, 0]], place_TK[chosen_TK], weight_TK[chosen_TK]
        count = np.bincount(place, minlength=size).reshape(-1, experts)
        self._count[number][blocks] += count
        self._first[number][blocks] += np.bincount(first_T, minlength=size).reshape(-1, experts)
        self._weight[number][blocks] += np.bincount(place, weight, minlength=size).reshape(-1, experts)
        count_E = count.sum(0)
        if count_E.any():
            self._max_vio[number] += (count_E.max() / count_E.mean() - 1) * len(block_T)

    def _refuse_non_finite(self, finite: Mapping[int, Tensor]) -> None:
        device = next(iter(finite.values())).device if finite else None
        sums = torch.stack([each.to(device) for each in finite.values()]).tolist() if finite else []
        for number, value in zip(finite, sums, strict=True):
            if not np.isfinite(value):
                raise InputError(
                    f"{escape(self._taps[number].point.name)}: the router's scores hold NaN or infinity.",
                    "What it chose means nothing.",
                    "Check the model's weights, or run it in float32.",
                )


def merged(parts: Sequence[Recording]) -> Recording:
    """The recordings that several processes made of different documents of the same data, as one."""
    first, *others = parts
    statistics = first.statistics
    for other in others:
        statistics = statistics + other.statistics
    order_T = np.argsort(np.concatenate([part.trace.tokens.document_T for part in parts]), kind="stable")

    def joined(arrays: Sequence[np.ndarray | None]) -> Any:
        return None if arrays[0] is None else np.concatenate([each for each in arrays if each is not None])[order_T]

    tokens = [part.trace.tokens for part in parts]
    names = ("token_T", "document_T", "position_T", "phase_T", "predicted_T")
    all_tokens = replace(tokens[0], **{name: joined([getattr(each, name) for each in tokens]) for name in names})
    layers = tuple(
        Routed(
            layer[0].point,
            joined([each.index_TK for each in layer]),
            joined([each.weight_TK for each in layer]),
            joined([each.score_TE for each in layer]),
        )
        for layer in zip(*(part.trace.layers for part in parts), strict=True)
    )
    trace = RoutingTrace(all_tokens, layers, first.trace.about)
    return Recording(statistics, trace, len(trace) / max(statistics.tokens, 1))


def _by_weight(index_TK: np.ndarray, weight_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's experts by falling weight, those of equal weight as they came."""
    if (weight_TK[:, :-1] >= weight_TK[:, 1:]).all():
        return index_TK, weight_TK
    order_TK = np.argsort(-weight_TK, axis=1, kind="stable")
    return np.take_along_axis(index_TK, order_TK, 1), np.take_along_axis(weight_TK, order_TK, 1)
