"""llama.cpp's moe-trace: CSV of one sequence, a prompt and its continuation, without token ids.

    layer,expert             a row per choice: ubatch by ubatch, layer by layer, token by token, a token's K together
    pos,layer,id0,id1,...    a row per token and layer; negative positions are the prompt's

Sources: github.com/ggml-org/llama.cpp pull request 28544 (examples/moe-trace), and github.com/thecodacus/llama.cpp,
tools/moe-trace/moe-trace.cpp. The first says nothing of tokens: they are told apart by counting K choices, which is
taken from the rows of a layer that stand together, as a pass over one token has K of them.
"""

from __future__ import annotations

from itertools import groupby
from math import gcd
from pathlib import Path

import numpy as np

from moectl.routing.ingest.files import NeedsFact, damaged, domain_of, members, raw
from moectl.routing.ingest.formats import Facts
from moectl.routing.ingest.recording import Source, recording
from moectl.traces.pack import Document
from moectl.traces.store import Recording
from moectl.traces.trace import DECODE, PREFILL

SUFFIXES = (".csv",)


def recognises(path: Path) -> bool:
    """CSV whose first row is two or more whole numbers, or `layer,expert`."""
    files = [path] if path.is_file() else sorted(path.rglob("*.csv"))[:1]
    first = raw(files[0], 4096).splitlines()[:1] if files else []
    return bool(first) and (_is_header(first[0]) or _row(first[0]) is not None)


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """One document per file; its domain is the file's name, or the folder's below `path`.

    Raises:
        InputError: a row is not whole numbers, rows are of different lengths, layers have different numbers of tokens,
            the experts per token cannot be told, or as `recording`.
    """
    source = Source("llama_cpp", path, facts)
    documents, layers = [], None
    for file in members(path, SUFFIXES):
        rows_RC = _rows(file)
        found, document = _narrow(source, file, rows_RC) if rows_RC.shape[1] == 2 else _wide(file, rows_RC)
        if layers not in (None, found):
            raise damaged(file, f"it has the layers {found}, and the files before it {layers}")
        layers = found
        documents.append(Document(document[0], domain_of(file, path), phase_T=document[1]))
    return {"decoder": recording(source, documents, layers)}


def _rows(file: Path) -> np.ndarray:
    lines = raw(file).splitlines()
    start = 1 if lines and _is_header(lines[0]) else 0
    rows: list[list[int]] = []
    for number, line in enumerate(lines[start:], start + 1):
        if line.strip():
            row = _row(line)
            if row is None or (rows and len(row) != len(rows[0])):
                raise damaged(file, f"not {len(rows[0]) if rows else 'two or more'} whole numbers", number)
            rows.append(row)
    if not rows:
        raise damaged(file, "it holds no rows")
    return np.array(rows, np.int32)


def _narrow(source: Source, file: Path, rows_RC: np.ndarray) -> tuple[list[int], tuple[np.ndarray, np.ndarray]]:
    layer_R, expert_R = rows_RC.T
    runs = [(layer, len(list(run))) for layer, run in groupby(layer_R.tolist())]
    top_k = source.facts.top_k or gcd(*(length for _, length in runs))
    layers = sorted({layer for layer, _ in runs})
    counts = {layer: int((layer_R == layer).sum()) for layer in layers}
    even = len(set(counts.values())) == 1 and not any(length % top_k for _, length in runs)
    guessed = source.facts.top_k is None
    if guessed and even and any(len(set(token)) < top_k for token in expert_R.reshape(-1, top_k).tolist()):
        raise NeedsFact(
            f"every pass is over several tokens, or there is one layer, so {top_k} choices stand together",
            "Give the experts per token with --top-k.",
        ).of(file)
    if not even:
        raise damaged(
            file,
            f"its layers have between {min(counts.values())} and {max(counts.values())} choices, "
            f"of which {top_k} cannot be made a token everywhere",
            fix="Give the experts per token with --top-k, or record it again.",
        )
    if guessed:
        source.warnings.append(
            f"{file.name} does not say how many experts a token has: {top_k} is what the rows of a layer that stand "
            "together have in common. Give --top-k if it is another."
        )
    index_TLK = np.stack([expert_R[layer_R == layer].reshape(-1, top_k) for layer in layers], 1)
    first = [length // top_k for layer, length in runs if layer == layers[0]]
    phase_T = np.concatenate([np.full(tokens, PREFILL if tokens > 1 else DECODE) for tokens in first])
    return layers, (index_TLK, phase_T)


def _wide(file: Path, rows_RC: np.ndarray) -> tuple[list[int], tuple[np.ndarray, np.ndarray]]:
    layers = sorted(set(rows_RC[:, 1].tolist()))
    parts = [rows_RC[rows_RC[:, 1] == layer] for layer in layers]
    if any(not np.array_equal(part[:, 0], parts[0][:, 0]) for part in parts):
        raise damaged(file, "its layers have different positions")
    return layers, (np.stack([part[:, 2:] for part in parts], 1), np.where(parts[0][:, 0] < 0, PREFILL, DECODE))


def _is_header(line: bytes) -> bool:
    return line.strip().lower().replace(b" ", b"") == b"layer,expert"


def _row(line: bytes) -> list[int] | None:
    try:
        row = [int(cell) for cell in line.split(b",")]
    except ValueError:
        return None
    return row if len(row) > 1 and all(abs(number) < 2**31 for number in row) else None
