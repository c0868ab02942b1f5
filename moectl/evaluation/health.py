"""Are a MoE's experts alive and different, and its routers sane? Read from the weights, a chunk at a time.

Legend: E experts, N elements of one expert's matrices in a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moectl.checkpoint.dtypes import FLOATS, ITEM_BYTES, numpy_dtype
from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.families.expert_tensors import expert_tensors, moe_block, router_tensors

_CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """One MoE layer. Norms are Frobenius; a cosine of 1 means equal experts, 0 unrelated ones.

    `zero_experts` have a norm of 0. Router rows are the weights that make one expert's logit; None where the
    layer's router could not be found by name.
    """

    layer: str
    experts: int
    zero_experts: int
    norm_min: float
    norm_max: float
    cosine_min: float | None
    cosine_mean: float | None
    cosine_max: float | None
    router_std: float | None
    router_row_norm_min: float | None
    router_row_norm_max: float | None


@dataclass(frozen=True, slots=True)
class Health:
    """What the weights say. `nonfinite` maps tensor names to how many NaN or infinite elements they hold."""

    layers: tuple[LayerHealth, ...]
    nonfinite: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def health(checkpoint: Checkpoint, on_bytes: Callable[[int], None] = lambda _: None) -> Health:
    """Read every floating-point weight once and report on experts and routers; memory is a few chunks."""
    nonfinite: dict[str, int] = {}
    blocks, routers = expert_tensors(checkpoint.tensors), router_tensors(checkpoint.tensors)
    of_experts = {ref.name.partition("[")[0] for block in blocks.values() for refs in block.values() for ref in refs}
    for name, ref in checkpoint.tensors.items():
        if ref.dtype not in FLOATS or name in of_experts:
            continue
        bad = sum(int((~np.isfinite(chunk)).sum()) for chunk in _values(ref))
        if bad:
            nonfinite[name] = bad
        on_bytes(ref.nbytes)
    layers = []
    for block, matrices in blocks.items():
        gram = np.zeros((0, 0))
        for refs in matrices.values():
            part = _gram(refs, nonfinite)
            gram = part if not gram.size else gram + part
            on_bytes(sum(ref.nbytes for ref in refs))
        layers.append(_layer(block, gram, routers.get(moe_block(block))))
    return Health(tuple(layers), nonfinite)


def _values(ref: TensorRef) -> Iterator[np.ndarray]:
    for raw in Checkpoint.chunks(ref, _CHUNK_ELEMENTS * ITEM_BYTES[ref.dtype]):
        yield np.frombuffer(raw, numpy_dtype(ref.dtype)).astype(np.float32)


def _gram(refs: list[TensorRef], nonfinite: dict[str, int]) -> np.ndarray:
    """Inner products of all pairs of experts' equally shaped matrices: float64 [E, E]; NaN and infinity count as 0."""
    total = np.zeros((len(refs), len(refs)))
    for chunks in zip(*(_values(ref) for ref in refs), strict=True):
        rows_EN = np.stack(chunks)
        finite = np.isfinite(rows_EN)
        if not finite.all():
            for ref, good in zip(refs, finite, strict=True):
                if not good.all():
                    nonfinite[ref.name] = nonfinite.get(ref.name, 0) + int((~good).sum())
            rows_EN = np.where(finite, rows_EN, 0.0)
        rows_EN = rows_EN.astype(np.float64)
        total += rows_EN @ rows_EN.T
    return total


def _layer(block: str, gram: np.ndarray, router: TensorRef | None) -> LayerHealth:
    norms = np.sqrt(np.diag(gram))
    alive = norms > 0
    cosines = (gram[np.ix_(alive, alive)] / np.outer(norms[alive], norms[alive]))[np.triu_indices(int(alive.sum()), 1)]
    rows = None
    if router is not None:
        rows = np.concatenate(list(_values(router))).reshape(router.shape).astype(np.float64)
    row_norms = None if rows is None else np.linalg.norm(rows, axis=1)
    return LayerHealth(
        layer=moe_block(block),
        experts=len(norms),
        zero_experts=int((~alive).sum()),
        norm_min=float(norms.min()),
        norm_max=float(norms.max()),
        cosine_min=float(cosines.min()) if cosines.size else None,
        cosine_mean=float(cosines.mean()) if cosines.size else None,
        cosine_max=float(cosines.max()) if cosines.size else None,
        router_std=None if rows is None else float(rows.std()),
        router_row_norm_min=None if row_norms is None else float(row_norms.min()),
        router_row_norm_max=None if row_norms is None else float(row_norms.max()),
    )
