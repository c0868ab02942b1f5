"""How alike the experts of a checkpoint are by their weights, and its routers' rows: read from disk, no model is run.

Legend: E experts, D hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moectl.checkpoint.dtypes import numpy_dtype
from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.expert_tensors import expert_tensors, moe_block, router_tensors
from moectl.text import escape
from moectl.traces.similarity import Similarity, rows_similarity, similarity


@dataclass(frozen=True, slots=True)
class Alike:
    """One MoE layer.

    Attributes:
        layer: its number, or the name of its block where there is none.
        experts: cosines between the experts' weights.
        router: between the rows of the router; None if it was not found by name.
        closest: the two experts that are most alike, and their cosine.
    """

    layer: str
    experts: Similarity
    router: Similarity | None
    closest: tuple[int, int, float]

    @property
    def mean(self) -> float:
        """The mean cosine of two experts."""
        return _mean(self.experts.cosine_EE)

    @property
    def router_mean(self) -> float | None:
        """The mean cosine of two rows of the router."""
        return None if self.router is None else _mean(self.router.cosine_EE)


def alike(checkpoint: Checkpoint, on_layer: Callable[[int], None] = lambda _done: None) -> list[Alike]:
    """The similarities of every layer of at least two experts.

    Raises:
        InputError: no experts are found by name, or their weights are quantised.
    """
    routers = router_tensors(checkpoint.tensors)
    found = []
    for block, matrices in expert_tensors(checkpoint.tensors).items():
        experts = len(next(iter(matrices.values())))
        if experts < 2:
            continue
        ref = routers.get(moe_block(block))
        cosines = similarity(partial(_expert, tuple(matrices.values())), experts)
        router = None if ref is None else rows_similarity(_read(ref).reshape(ref.shape))
        found.append(Alike(_label(block), cosines, router, _closest(cosines.cosine_EE)))
        on_layer(1)
    if not found:
        raise InputError(
            f"{escape(checkpoint.name)} has no experts that are found by name, in floating point.",
            "Their weights cannot be compared.",
            "Leave --weights out.",
        )
    return found


def _expert(matrices: Sequence[Sequence[TensorRef]], number: int) -> np.ndarray:
    return np.concatenate([_read(refs[number]) for refs in matrices])


def _read(ref: TensorRef) -> np.ndarray:
    return np.frombuffer(b"".join(Checkpoint.chunks(ref)), numpy_dtype(ref.dtype)).astype(np.float32)


def _label(block: str) -> str:
    number = re.search(r"\.(?:layers|blocks|block|h)\.(\d+)\.", block)
    return number[1] if number else escape(moe_block(block))


def _mean(cosine_EE: np.ndarray) -> float:
    return float(cosine_EE[np.triu_indices(len(cosine_EE), 1)].mean())


def _closest(cosine_EE: np.ndarray) -> tuple[int, int, float]:
    upper_EE = np.where(np.triu(np.ones_like(cosine_EE, bool), 1), cosine_EE, -2.0)
    one, other = np.unravel_index(np.argmax(upper_EE), upper_EE.shape)
    return int(one), int(other), float(cosine_EE[one, other])
