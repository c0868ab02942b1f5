"""What became of every expert's matrices: written into the layer files, and read from there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One matrix of one expert.

    Attributes:
        parameter: what it lies in, by its name in memory.
        expert: its number.
        rows, columns: outputs and inputs.
        tokens: that were routed to it.
        looked_at: those of them, or of others, that its Hessian is of.
        sparsity: the share of weights that became zero.
        error: of its outputs on calibration tokens, relative to their energy; of its weights where it is cold.
        bits: per weight, of all that is stored; what belongs to a whole stack is shared evenly by its matrices.
        factor: levels as multiples of the root mean square of a row, where bits were asked for; else 0.
        cold: too few tokens: rounded to nearest.
        fallback: its Hessian could not be factored as it was.
    """

    parameter: str
    expert: int
    rows: int
    columns: int
    tokens: int
    looked_at: int
    sparsity: float
    error: float
    bits: float
    factor: float
    cold: bool
    fallback: bool


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One decoder layer, or what lies outside them (index None)."""

    index: int | None
    name: str
    matrices: tuple[MatrixReport, ...]
    seconds: float


def matrix_reports(
    names: Sequence[str],
    shape: tuple[int, int],
    tokens: Tensor,
    looked_at: Tensor,
    cold: Tensor,
    piece: Mapping[str, Tensor],
    stored: Sequence[float],
) -> list[MatrixReport]:
    """Those of a stack's matrices, in the order of the experts; `stored` are the bits of each."""
    zeros, error, factor, fallback = (piece[key].tolist() for key in ("zeros_G", "error_G", "factor_G", "fallback_G"))
    bits = [each / math.prod(shape) for each in stored]
    rows = zip(tokens.tolist(), looked_at.tolist(), zeros, error, bits, factor, cold.tolist(), fallback, strict=True)
    return [
        MatrixReport(names[0 if len(names) == 1 else expert], expert, *shape, *row) for expert, row in enumerate(rows)
    ]


def stored_bits(tensors: Mapping[str, np.ndarray], experts: int) -> list[float]:
    """How many bits each matrix of a stack takes: its own codewords, and its share of everything else.

    Args:
        tensors: what is stored of the stack, as moectl.codecs or compressed-tensors have it.
        experts: how many matrices it has.
    """
    nbytes, own = sum(tensor.nbytes for tensor in tensors.values()), [0] * experts
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if "codes" in parts:
        own = (parts["counts"].reshape(experts, -1).sum(1, dtype=int) * parts["codes"].itemsize).tolist()
    return [8 * (each + (nbytes - sum(own)) / experts) for each in own]


def to_metadata(report: LayerReport) -> dict[str, str]:
    """The metadata of a layer file; how long it took is not in it, so that the file does not depend on that."""
    keys = [field.name for field in fields(MatrixReport)]
    columns = {key: [getattr(matrix, key) for matrix in report.matrices] for key in keys}
    return {"report": json.dumps({"index": report.index, "name": report.name, "matrices": columns}, allow_nan=False)}


def note_file(path: Path) -> Path:
    """What is kept beside a layer file: how long the layer took, and the file's hash."""
    return path.with_suffix(".json")


def reports(paths: Iterable[Path]) -> list[LayerReport]:
    """Of the layer files that the pipeline gave, in their order."""
    from safetensors import safe_open

    found = []
    for path in paths:
        with safe_open(path, "np") as file:
            value: dict[str, Any] = json.loads(file.metadata()["report"])
        columns = value["matrices"]
        matrices = tuple(MatrixReport(*row) for row in zip(*columns.values(), strict=True))
        seconds = json.loads(note_file(path).read_bytes())["seconds"]
        found.append(LayerReport(value["index"], value["name"], matrices, seconds))
    return found
