"""Traces on disk: a directory of safetensors files and one JSON file that describes them. Nothing is unpickled.

    trace.json                        schema, about, and for each stream its domains, points and numbers
    STREAM.tokens.safetensors         token, document, position, phase; domain (of documents); predicted if recorded
    STREAM.layers.safetensors         INDEX.index int16 [T, K], INDEX.weight float16 [T, K], INDEX.score float16 [T, E]
    STREAM.statistics.safetensors     what was counted over all tokens, also those that the trace has not

STREAM is `decoder` or `encoder`; INDEX numbers the points in their order. Numbers of experts are int32 where there are
more than 32,767. The directory appears by one rename, complete. Arrays are
mapped, not read, so that a trace may be larger than memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moectl.checkpoint.header import read_header
from moectl.checkpoint.source import read_json
from moectl.errors import InputError, UsageError
from moectl.text import escape
from moectl.traces.statistics import Load, RoutingStatistics, Scored
from moectl.traces.trace import Point, Routed, RoutingTrace, Tokens

SCHEMA = "moectl.trace/1"
DESCRIPTION = "trace.json"
_DTYPES = {"U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run left of one stream of tokens: counts over all of them, and a trace of all or of some.

    Attributes:
        statistics: over all tokens.
        trace: of whole documents; of all when `sampled` is 1.
        sampled: which share of the tokens the trace has.
    """

    statistics: RoutingStatistics
    trace: RoutingTrace
    sampled: float = 1.0


def index_dtype(num_experts: int) -> type[np.signedinteger[Any]]:
    """What the numbers of that many experts are kept as."""
    return np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32


def bytes_per_token(points: tuple[Point, ...], *, scores: bool) -> int:
    """What a token takes in a trace of those points."""
    own = 4 + 4 + 4 + 1
    return own + sum(
        point.top_k * (index_dtype(point.num_experts)().itemsize + 2)
        + (2 * point.num_experts if scores and point.score_kind != "none" else 0)
        for point in points
    )


def is_trace(path: Path) -> bool:
    """Whether a directory is a trace of this format."""
    return (path / DESCRIPTION).is_file()


def require_place(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that `save` would refuse.

    Raises:
        UsageError: there is something at `path`, and it is no trace or `overwrite` is not given.
    """
    if path.exists() and not (overwrite and is_trace(path)):
        raise UsageError(
            f"{escape(str(path))} exists.",
            "" if is_trace(path) else "It is no trace, so it is never removed.",
            "Give --overwrite to replace it, or another directory." if is_trace(path) else "Give another directory.",
        )


def save(recordings: Mapping[str, Recording], path: Path, *, overwrite: bool = False) -> None:
    """Write recordings, by stream, to a new directory.

    Raises:
        UsageError: there is something at `path`, and it is no trace or `overwrite` is not given.
    """
    require_place(path, overwrite=overwrite)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    streams = {}
    for stream, recording in recordings.items():
        streams[stream] = _described(recording)
        save_file(_token_arrays(recording.trace.tokens), partial / f"{stream}.tokens.safetensors")
        save_file(_layer_arrays(recording.trace), partial / f"{stream}.layers.safetensors")
        save_file(_statistics_arrays(recording.statistics), partial / f"{stream}.statistics.safetensors")
    about = dict(next(iter(recordings.values())).trace.about)
    text = json.dumps({"schema": SCHEMA, "about": about, "streams": streams}, indent=1)
    (partial / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def load(path: Path) -> dict[str, Recording]:
    """Read the recordings of a directory, by stream.

    Raises:
        InputError: it is no trace, or a file of it is missing or damaged: the file is named.
    """
    if not is_trace(path):
        raise InputError(
            f"{escape(str(path))} is no routing trace.",
            f"There is no {DESCRIPTION} in it.",
            "Give the directory that `moectl analyze-routing --trace` made.",
        )
    document = read_json(path / DESCRIPTION)
    if document.get("schema") != SCHEMA:
        raise _damaged(path / DESCRIPTION, f"its schema is {document.get('schema')!r}, not {SCHEMA}")
    try:
        return {
            stream: _recording(described, document["about"], path, stream)
            for stream, described in document["streams"].items()
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(path / DESCRIPTION, f"{type(error).__name__}: {error}") from error


def _described(recording: Recording) -> dict[str, Any]:
    statistics = recording.statistics
    return {
        "domains": list(statistics.domains),
        "points": [asdict(load.point) for load in statistics.loads],
        "tokens": len(recording.trace),
        "tokens_counted": statistics.tokens,
        "documents_counted": statistics.documents,
        "sampled": recording.sampled,
        "dropped": [load.dropped for load in statistics.loads],
        "scored": [
            None if load.scored is None else [load.scored.tokens, load.scored.entropy, _number(load.scored.z)]
            for load in statistics.loads
        ],
        "max_vio_batch": list(statistics.max_vio_batch),
    }


def _token_arrays(tokens: Tokens) -> dict[str, np.ndarray]:
    arrays = {
        "token": tokens.token_T,
        "document": tokens.document_T,
        "position": tokens.position_T,
        "phase": tokens.phase_T,
        "domain": tokens.domain_N,
    }
    if tokens.predicted_T is not None:
        arrays["predicted"] = tokens.predicted_T
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _layer_arrays(trace: RoutingTrace) -> dict[str, np.ndarray]:
    arrays = {}
    for number, routed in enumerate(trace.layers):
        parts = {"index": routed.index_TK, "weight": routed.weight_TK, "score": routed.score_TE}
        for name, array in parts.items():
            if array is not None:
                arrays[f"{number}.{name}"] = np.ascontiguousarray(array)
    return arrays


def _statistics_arrays(statistics: RoutingStatistics) -> dict[str, np.ndarray]:
    arrays = {"domain": statistics.domain_B, "tokens": statistics.tokens_B}
    for number, counts in enumerate(statistics.loads):
        arrays |= {f"{number}.count": counts.count_BE, f"{number}.first": counts.first_BE}
        if counts.weight_BE is not None:
            arrays[f"{number}.weight"] = counts.weight_BE
        if counts.scored is not None:
            arrays |= {f"{number}.probability": counts.scored.probability_E, f"{number}.margin": counts.scored.margin_M}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _recording(described: Mapping[str, Any], about: Mapping[str, Any], path: Path, stream: str) -> Recording:
    points = tuple(Point(**point) for point in described["points"])
    domains = tuple(described["domains"])
    token = _arrays(path / f"{stream}.tokens.safetensors")
    tokens = Tokens(
        token["token"],
        token["document"],
        token["position"],
        token["phase"],
        token["domain"],
        domains,
        token.get("predicted"),
    )
    layer = _arrays(path / f"{stream}.layers.safetensors")
    routed = tuple(
        Routed(point, layer[f"{number}.index"], layer.get(f"{number}.weight"), layer.get(f"{number}.score"))
        for number, point in enumerate(points)
    )
    counts = _arrays(path / f"{stream}.statistics.safetensors")
    loads = []
    for number, point in enumerate(points):
        sums = described["scored"][number]
        scored = None
        if sums is not None:
            z = float("nan") if sums[2] is None else sums[2]
            scored = Scored(sums[0], counts[f"{number}.probability"], sums[1], z, counts[f"{number}.margin"])
        dropped = described["dropped"][number]
        parts = counts[f"{number}.count"], counts[f"{number}.first"], counts.get(f"{number}.weight")
        loads.append(Load(point, *parts, dropped, scored))
    statistics = RoutingStatistics(
        domains,
        counts["domain"],
        counts["tokens"],
        described["documents_counted"],
        tuple(loads),
        tuple(described["max_vio_batch"]),
    )
    recording = Recording(statistics, RoutingTrace(tokens, routed, about), float(described["sampled"]))
    counted = described["tokens"], described["tokens_counted"]
    if counted != (len(tokens), statistics.tokens) or not _fits(recording):
        raise ValueError(f"the parts of {stream} do not fit together")
    return recording


def _fits(recording: Recording) -> bool:
    """Whether arrays that are read together have the shapes and numbers that they need of each other."""
    statistics, tokens = recording.statistics, recording.trace.tokens
    of_tokens = (tokens.document_T, tokens.position_T, tokens.phase_T, tokens.predicted_T)
    blocks = statistics.domain_B.shape
    shapes = [(array, tokens.token_T.shape) for array in of_tokens] + [(statistics.tokens_B, blocks)]
    for routed, counts in zip(recording.trace.layers, statistics.loads, strict=True):
        if routed.index_TK.dtype.kind != "i":
            return False
        per_block = (*blocks, routed.point.num_experts)
        shapes += [(array, per_block) for array in (counts.count_BE, counts.first_BE, counts.weight_BE)]
        shapes += [(routed.weight_TK, routed.index_TK.shape)]
        shapes += [(routed.score_TE, (len(tokens), routed.point.num_experts))]
    numbers = (
        (tokens.document_T, len(tokens.domain_N)),
        (tokens.domain_N, len(tokens.domains)),
        (statistics.domain_B, len(statistics.domains)),
    )
    return all(array is None or array.shape == shape for array, shape in shapes) and all(
        (array.dtype.kind == "i" and 0 <= array.min(initial=0) <= array.max(initial=-1) < limit) or not array.size
        for array, limit in numbers
    )


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped: they are read from disk when they are looked at, and cannot be written to."""
    try:
        refs = read_header(file)
    except InputError as error:
        raise InputError(error.what, "The trace is damaged.", "Capture it again.") from error
    unknown = {ref.dtype for ref in refs.values()} - set(_DTYPES)
    if unknown:
        raise _damaged(file, f"it holds arrays of {', '.join(sorted(unknown))}")
    data = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    return {
        name: data[ref.offset : ref.offset + ref.nbytes].view(_DTYPES[ref.dtype]).reshape(ref.shape)
        for name, ref in refs.items()
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"{escape(str(file))}: {escape(what)}.", "The trace is damaged.", "Capture it again.")
