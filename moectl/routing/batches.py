"""From documents to the rows that a model is given: cut, sorted by length, padded on the right, and each accounted for.

Legend: B rows of a batch, L places in each, R = B * L, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from moectl.data.documents import Documents
from moectl.routing.recorder import PADDING, Rows

_WINDOW = 256
"""So many cuts at a time are sorted by length: enough to pad little, few enough for progress to be even."""

_Cut = tuple[int, int, int]
"""A document, and where in it a row begins and ends."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The documents of a run as token ids, in the order in which they were read.

    Attributes:
        ids_N: the ids of each document, int32.
        domain_N: the number of its domain.
        domains: their names.
    """

    ids_N: tuple[np.ndarray, ...]
    domain_N: np.ndarray
    domains: tuple[str, ...]

    @property
    def length_N(self) -> np.ndarray:
        """How many tokens each has."""
        return np.array([len(ids) for ids in self.ids_N], np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [B, L] for a model, and what each of the R places is."""

    token_BL: np.ndarray
    rows: Rows


def read_texts(documents: Documents, encode: Callable[[str], list[int]], max_tokens: int, cut: int | None) -> Texts:
    """The first documents of each domain, up to an equal share of `max_tokens` each; the last one may be shortened.

    The domains take turns, so that a batch holds something of each. With `cut`, no document has more tokens than that.

    Raises:
        InputError: the data cannot be read.
    """
    by_domain = documents.by_domain()
    found: list[tuple[float, int, np.ndarray]] = []
    for domain, of_domain in enumerate(by_domain.values()):
        share = -(-max_tokens // len(by_domain))
        left = share
        for document in of_domain:
            ids = np.array(encode(document.text)[: left if cut is None else min(cut, left)], np.int32)
            if len(ids):
                found.append((1 - left / share, domain, ids))
            left -= len(ids)
            if left <= 0:
                break
    found.sort(key=lambda each: each[0])
    return Texts(
        tuple(ids for _, _, ids in found), np.array([domain for _, domain, _ in found], np.int32), tuple(by_domain)
    )


def batches(
    texts: Texts, documents: Sequence[int], *, sequence_length: int, batch_tokens: int, pad: bool
) -> Iterator[Batch]:
    """All tokens of some of the documents, each once, in rows of at most `sequence_length` tokens.

    A longer document is cut, and what follows a cut sees nothing of what stands before it. Rows are padded on the
    right, where no causal model looks; without `pad` a batch holds rows of one length.
    """
    cuts = (
        (number, start, min(start + sequence_length, len(texts.ids_N[number])))
        for number in documents
        for start in range(0, len(texts.ids_N[number]), sequence_length)
    )
    while window := list(islice(cuts, _WINDOW)):
        group: list[_Cut] = []
        for cut in sorted(window, key=_length, reverse=True):
            full = group and _length(group[0]) * (len(group) + 1) > batch_tokens
            if full or (group and not pad and _length(cut) != _length(group[0])):
                yield _batch(texts, group)
                group = []
            group.append(cut)
        yield _batch(texts, group)


def prefixed(batch: Batch, prefix_id: int) -> Batch:
    """The same rows, each after one token that belongs to no document."""

    def wider(array_R: np.ndarray, value: int) -> np.ndarray:
        return np.pad(array_R.reshape(batch.token_BL.shape), ((0, 0), (1, 0)), constant_values=value)

    token_BL = wider(batch.token_BL, prefix_id)
    document_BL, position_BL = wider(batch.rows.document_R, PADDING), wider(batch.rows.position_R, 0)
    return Batch(token_BL, Rows(document_BL.ravel(), position_BL.ravel(), token_BL.ravel()))


def _length(cut: _Cut) -> int:
    return cut[2] - cut[1]


def _batch(texts: Texts, cuts: Sequence[_Cut]) -> Batch:
    shape = len(cuts), _length(cuts[0])
    token_BL = np.zeros(shape, np.int64)
    document_BL, position_BL = np.full(shape, PADDING, np.int32), np.zeros(shape, np.int32)
    for row, (number, start, end) in enumerate(cuts):
        token_BL[row, : end - start] = texts.ids_N[number][start:end]
        document_BL[row, : end - start] = number
        position_BL[row, : end - start] = np.arange(start, end)
    return Batch(token_BL, Rows(document_BL.ravel(), position_BL.ravel(), token_BL.ravel()))
