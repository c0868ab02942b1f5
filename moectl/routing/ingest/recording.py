"""From what was recorded of each document to a Recording, with what has to be said of it.

Legend: T tokens of all documents, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moectl.routing.ingest.files import damaged
from moectl.routing.ingest.formats import Facts
from moectl.traces.pack import Document, pack
from moectl.traces.store import Recording
from moectl.traces.trace import NO_EXPERT, Point

MAX_EXPERTS = 32_768
"""More than any model has: a higher number is damage, unless the number of experts is given."""

ORDER_ROWS = 32
"""So many lists of experts in the order of their numbers are no chance: at most 1 in 2^32 for two experts."""

FIRST_CHOICE = ("vocabulary", "context_independence", "flow", "paths", "separation")
"""Analyses of first choices alone."""


@dataclass(slots=True)
class Source:
    """What is read, and what is to be said of it.

    Attributes:
        format: its name.
        path: the file or directory.
        facts: that the user gave.
        warnings: sentences for the user.
        off: for analyses (functions of `moectl.traces`) that can say nothing, why.
    """

    format: str
    path: Path
    facts: Facts
    warnings: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)

    def about(self, documents: int) -> dict[str, Any]:
        """What the trace keeps of it."""
        return {
            "format": self.format,
            "source": self.path.name,
            "documents": documents,
            "warnings": list(self.warnings),
            "off": dict(self.off),
        }


def recording(
    source: Source,
    documents: Sequence[Document],
    layers: Sequence[int] | None = None,
    role: str = "decoder",
) -> Recording:
    """The Recording of documents with [T, L, K] experts; `layers` are the numbers of the L, 0 and on if not given.

    Layers that no token was ever routed at (SGLang lists the dense ones too) and tokens without a choice at any layer
    are left out; columns that hold no expert anywhere are cut off.

    Raises:
        InputError: the documents are not of the same layers and experts, there are none, a token was sent to the same
            expert twice, an expert's number is too high, or `facts` say otherwise.
    """
    documents = [document for document in documents if len(document)]
    index_TLK = _joined(source, documents)
    layers = range(index_TLK.shape[1]) if layers is None else layers
    top_k = index_TLK.shape[2]
    kept_T, kept_L = _routed(source, index_TLK, layers)
    index_TLK = index_TLK[kept_T][:, kept_L]
    _check_repeats(source, index_TLK)
    _check_order(source, index_TLK)
    num_experts = _num_experts(source, int(index_TLK.max()))
    if all(document.token_T is None for document in documents):
        source.off |= dict.fromkeys(("vocabulary", "context_independence"), "the recording has no token ids")
    points = [
        Point(f"{role}.layers.{layer}", layer, num_experts, top_k, role)
        for layer, kept in zip(layers, kept_L, strict=True)
        if kept
    ]
    masks = np.split(kept_T, np.cumsum([len(document) for document in documents])[:-1])
    kept_documents = [
        replace(document, index_TLK=document.index_TLK[:, kept_L, :top_k]).where(mask_T)
        for document, mask_T in zip(documents, masks, strict=True)
        if mask_T.any()
    ]
    return pack(points, kept_documents, source.about(len(kept_documents)))


def _joined(source: Source, documents: Sequence[Document]) -> np.ndarray:
    """The experts of all documents [T, L, K], without columns that hold none."""
    shapes = {document.index_TLK.shape[1:] for document in documents}
    if len(shapes) != 1:
        what = f"documents of {len(shapes)} shapes [layers, experts per token]: {sorted(shapes)}"
        raise damaged(source.path, what if shapes else "it holds no tokens")
    index_TLK = np.concatenate([document.index_TLK for document in documents])
    columns = np.flatnonzero((index_TLK != NO_EXPERT).any((0, 1)))
    if not len(columns) or index_TLK.min() < NO_EXPERT:
        raise damaged(
            source.path, f"an expert has the number {index_TLK.min()}" if len(columns) else "it names no expert"
        )
    top_k = int(columns[-1]) + 1
    if source.facts.top_k not in (None, top_k):
        raise damaged(
            source.path,
            f"each token has {top_k} experts, not {source.facts.top_k}",
            fix="Correct the number of experts per token, or leave it out.",
        )
    return index_TLK[..., :top_k]


def _routed(source: Source, index_TLK: np.ndarray, layers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [T] and layers [L] are routed: a list of one number over and over, as of zeros, is no choice."""
    one_number_TL = (index_TLK == index_TLK[..., :1]).all(-1)
    blank_TL = one_number_TL & ((index_TLK.shape[-1] > 1) | (index_TLK[..., 0] == NO_EXPERT))
    kept_L = ~blank_TL.all(0)
    kept_T = ~blank_TL[:, kept_L].all(1)
    if not kept_L.any():
        raise damaged(source.path, "no token is routed to different experts at any layer")
    if not kept_L.all():
        left = [layer for layer, kept in zip(layers, kept_L, strict=True) if not kept]
        source.warnings.append(f"{len(left)} layers have no routing, so they are taken for dense: {_listed(left)}.")
    if not kept_T.all():
        source.warnings.append(f"{int((~kept_T).sum())} tokens have no routing and are left out.")
    return kept_T, kept_L


def _check_repeats(source: Source, index_TLK: np.ndarray) -> None:
    for layer in range(index_TLK.shape[1]):
        ordered_TK = np.sort(index_TLK[:, layer], -1)
        twice_T = ((np.diff(ordered_TK) == 0) & (ordered_TK[:, 1:] != NO_EXPERT)).any(-1)
        if twice_T.any():
            token = int(twice_T.argmax())
            raise damaged(
                source.path,
                f"token {token} of those with routing goes to the same expert twice at layer {layer} of those with "
                f"routing ({index_TLK[token, layer].tolist()}), and {int(twice_T.sum()) - 1} more do",
                fix="Check that the axes are tokens, layers, experts of a token, in the order of this format.",
            )


def _num_experts(source: Source, highest: int) -> int:
    given = source.facts.num_experts
    if given is None and highest < MAX_EXPERTS:
        source.warnings.append(
            f"The number of experts is not in the file: {highest + 1} is one more than the highest seen. "
            "Give --num-experts if there are more."
        )
        return highest + 1
    if given is None or highest >= given:
        raise damaged(
            source.path,
            f"it names expert {highest}, of {'no more than ' if given is None else ''}{given or MAX_EXPERTS}",
            fix="Give the right number with --num-experts, or record it again.",
        )
    return given


def _check_order(source: Source, index_TLK: np.ndarray) -> None:
    chosen = index_TLK[(index_TLK != NO_EXPERT).all(-1)]
    if index_TLK.shape[-1] > 1 and len(chosen) >= ORDER_ROWS and (np.diff(chosen) > 0).all():
        why = "the experts of a token stand in the order of their numbers, so none is known to be the first choice"
        source.off |= dict.fromkeys(FIRST_CHOICE, why) | source.off
        source.warnings.append(f"In this recording {why}: what is said of first choices means nothing.")


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
