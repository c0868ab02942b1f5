"""A RoutingTrace from what was recorded of each document or request. Legend: as in `trace.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moectl.errors import InputError
from moectl.traces.statistics import statistics_of
from moectl.traces.store import Recording, index_dtype
from moectl.traces.trace import NO_EXPERT, PREFILL, Point, Routed, RoutingTrace, Tokens

UNKNOWN = -1
"""In place of a token's number, or of its place where it is not known which token came before it."""


@dataclass(frozen=True, slots=True)
class Document:
    """What was recorded of one document.

    Attributes:
        index_TLK: the experts of each token at each point, in the order of the points.
        domain: the name of its domain.
        token_T: token ids; UNKNOWN where there are none.
        position_T: places in the document; the row's number if not given.
        phase_T: PREFILL or DECODE; all PREFILL if not given.
        predicted_T: the token that the model gave the highest logit after each.
    """

    index_TLK: np.ndarray
    domain: str = "all"
    token_T: np.ndarray | None = None
    position_T: np.ndarray | None = None
    phase_T: np.ndarray | None = None
    predicted_T: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index_TLK)

    def where(self, mask_T: np.ndarray) -> Document:
        """The tokens that a mask keeps; they keep their places."""
        position_T = np.arange(len(self)) if self.position_T is None else self.position_T
        optional = (self.token_T, position_T, self.phase_T, self.predicted_T)
        kept = (None if array is None else array[mask_T] for array in optional)
        return Document(self.index_TLK[mask_T], self.domain, *kept)


def pack(points: Sequence[Point], documents: Sequence[Document], about: Mapping[str, Any]) -> Recording:
    """A recording of all the documents, each with [T, L, K] experts of these L points of the same K.

    Raises:
        InputError: there is no token, or an expert's number is not below the point's `num_experts`.
    """
    if not any(map(len, documents)):
        raise InputError(
            "The recording holds no tokens.", "There is nothing to analyse.", "Record some requests, and read those."
        )
    domains = tuple(dict.fromkeys(document.domain for document in documents))
    predicted = [document.predicted_T for document in documents]
    tokens = Tokens(
        _joined(documents, "token_T", lambda size: np.full(size, UNKNOWN)),
        np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents]),
        _joined(documents, "position_T", np.arange),
        _joined(documents, "phase_T", lambda size: np.full(size, PREFILL)).astype(np.uint8),
        np.array([domains.index(document.domain) for document in documents], np.int32),
        domains,
        None if any(array is None for array in predicted) else _joined(documents, "predicted_T", np.empty),
    )
    routed = []
    for number, point in enumerate(points):
        index_TK = np.concatenate([document.index_TLK[:, number] for document in documents])
        if index_TK.max() >= point.num_experts or index_TK.min() < NO_EXPERT:
            wrong = index_TK.max() if index_TK.max() >= point.num_experts else index_TK.min()
            raise InputError(
                f"{point.name} names expert {wrong}, of {point.num_experts}.",
                "The recording is damaged, or the number of experts is another.",
                "Record it again, or correct the number.",
            )
        routed.append(Routed(point, index_TK.astype(index_dtype(point.num_experts))))
    trace = RoutingTrace(tokens, tuple(routed), about)
    return Recording(statistics_of(trace), trace)


def _joined(documents: Sequence[Document], name: str, missing: Any) -> np.ndarray:
    arrays = (getattr(document, name) for document in documents)
    given = [
        missing(len(document)) if array is None else array for document, array in zip(documents, arrays, strict=True)
    ]
    return np.concatenate(given).astype(np.int32)
