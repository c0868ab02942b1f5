"""SGLang's expert distribution recorder: `.pt` files of the modes `stat` and `per_token`.

    stat         {"logical_count": [steps, layers, E]}: counts alone, so a recording without a trace
    per_token    {"records": [{"input_ids", "positions", "extend_seq_lens", "topk_ids_of_layer" [layers, T, 8], ...}],
                  "last_physical_to_logical_map": [layers, physical experts]}

Source: github.com/sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py. Both list the dense layers too,
with nothing in them; `per_token` counts experts as they are placed (redundant copies have numbers of their own), pads
the 8 with -1, and does not say which request a decoded token is of.

The file is a pickle. It is read with torch's restricted unpickler and never otherwise.
"""

from __future__ import annotations

import pickle
import warnings
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from moectl.errors import InputError
from moectl.routing.ingest.files import NeedsFact, damaged, members, whole_numbers
from moectl.routing.ingest.formats import Facts
from moectl.routing.ingest.recording import MAX_EXPERTS, Source, recording
from moectl.text import escape, shown
from moectl.traces.pack import Document
from moectl.traces.statistics import Load, RoutingStatistics, blocks_of
from moectl.traces.store import Recording, index_dtype
from moectl.traces.trace import DECODE, NO_EXPERT, PREFILL, Point, Routed, RoutingTrace, Tokens

SUFFIXES = (".pt", ".pth")

ONLY_COUNTS = "coactivation repetition context_independence flow paths separation vocabulary saturation difference"


def recognises(path: Path) -> bool:
    """Files that torch saved."""
    files = [path] if path.is_file() else path.rglob("*")
    return any(file.is_file() and file.suffix in SUFFIXES for file in files)


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """Counts of all the steps, or a trace in which each request's prompt and each decoded token is a document.

    Raises:
        InputError: a file needs more than torch's restricted unpickler gives, is damaged, or is of another mode;
            `top_k` is not given for counts; or as `recording`.
    """
    source = Source("sglang_recorder", path, facts)
    dumps = [(file, _loaded(file)) for file in members(path, SUFFIXES)]
    if all("logical_count" in dump for _, dump in dumps):
        counts = [_integers(file, dump, "logical_count", 3) for file, dump in dumps]
        return {"decoder": _counts(source, counts)}
    documents: list[Document] = []
    seen: set[bytes] = set()
    for file, dump in dumps:
        documents += _documents(file, dump, seen)
    return {"decoder": recording(source, documents)}


def _loaded(file: Path) -> dict[str, Any]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises to report pickles of other protocols to its authors
            dump = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{escape(str(file))} is not loaded: {shown(str(error).splitlines()[0])}",
            "Loading any pickle runs what its writer wrote, so only tensors, numbers, lists and dictionaries are read.",
            "Where you trust it: torch.load it there, and torch.save its tensors alone.",
        ) from None
    except Exception as error:  # of a damaged archive torch, zipfile and the unpickler raise nearly anything
        raise damaged(file, shown(f"{type(error).__name__}: {error}")) from None
    if not isinstance(dump, dict):
        raise damaged(file, f"it holds a {type(dump).__name__}, not a dictionary")
    return dump


def _integers(file: Path, holder: dict[str, Any], name: str, dims: int) -> np.ndarray:
    value: Any = holder.get(name)
    try:
        return whole_numbers(value.numpy() if hasattr(value, "numpy") else value, dims)
    except (ValueError, TypeError, RuntimeError) as error:  # what torch says of a tensor that numpy has no type for
        raise damaged(file, f"of {name}, {error}", fix="Record it with the mode stat or per_token.") from None


def _counts(source: Source, counts: list[np.ndarray]) -> Recording:
    """Every step that counted something is a document of the statistics."""
    if len({array.shape[1:] for array in counts}) > 1:
        raise damaged(source.path, "the files count different layers or experts")
    count_SLE = np.concatenate(counts).astype(np.int64)
    count_SLE = count_SLE[count_SLE.any((1, 2))]
    layers: list[int] = np.flatnonzero(count_SLE.sum((0, 2))).tolist()
    num_experts = count_SLE.shape[2]
    if not layers or count_SLE.min() < 0 or num_experts > MAX_EXPERTS:
        raise damaged(source.path, "it counts nothing, less than nothing, or too many experts")
    choices_SL = count_SLE[:, layers].sum(2)
    common, top_k = gcd(*choices_SL.ravel().tolist()), source.facts.top_k
    if top_k is None or top_k > num_experts:
        raise NeedsFact(
            f"it does not say how many of {num_experts} experts a token has",
            f"Give their number with --top-k. All counts of a layer are multiples of {common}, so it divides that.",
        ).of(source.path)
    if common % top_k:
        source.warnings.append(
            f"The counts are no multiples of {top_k} experts per token, so tokens are rounded up: the mode "
            "was stat_approx, or --top-k is another."
        )
    if source.facts.num_experts not in (None, num_experts):
        raise damaged(source.path, f"it counts {num_experts} experts, not {source.facts.num_experts}")
    source.off |= dict.fromkeys(ONLY_COUNTS.split(), "the recording has counts and no tokens")
    tokens_S = -(-choices_SL.max(1) // top_k)
    block_S, domain_B = blocks_of(np.zeros(len(count_SLE), np.int64), 1)
    points = [Point(f"decoder.layers.{layer}", layer, num_experts, top_k) for layer in layers]
    loads, vio = [], []
    for point, layer in zip(points, layers, strict=True):
        count_SE = count_SLE[:, layer]
        count_BE = np.zeros((len(domain_B), num_experts), np.int64)
        np.add.at(count_BE, block_S, count_SE)
        dropped = int((tokens_S * top_k).sum() - count_BE.sum())
        loads.append(Load(point, count_BE, np.zeros_like(count_BE), dropped=dropped))
        fair_S = count_SE.mean(1)
        vio.append(float((count_SE.max(1) / fair_S.clip(1e-300) - 1)[fair_S > 0].mean()))
    tokens_B = np.bincount(block_S, weights=tokens_S, minlength=len(domain_B)).astype(np.int64)
    statistics = RoutingStatistics(("all",), domain_B, tokens_B, len(count_SLE), tuple(loads), tuple(vio))
    nothing = np.zeros(0, np.int32)
    tokens = Tokens(nothing, nothing, nothing, nothing.astype(np.uint8), nothing, ("all",))
    routed = tuple(Routed(point, np.zeros((0, top_k), index_dtype(num_experts))) for point in points)
    return Recording(statistics, RoutingTrace(tokens, routed, source.about(len(count_SLE))), sampled=0.0)


def _documents(file: Path, dump: dict[str, Any], seen: set[bytes]) -> list[Document]:
    records = dump.get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise damaged(
            file, "it has neither logical_count nor records", fix="Record it with the mode stat or per_token."
        )
    mapping_LP = None
    if dump.get("last_physical_to_logical_map") is not None:
        mapping_LP = _integers(file, dump, "last_physical_to_logical_map", 2)
    documents = []
    for record in records:
        index_TLK = _integers(file, record, "topk_ids_of_layer", 3).swapaxes(0, 1)
        token_T, position_T = (_integers(file, record, name, 1) for name in ("input_ids", "positions"))
        if not len(index_TLK) == len(token_T) == len(position_T):
            raise damaged(file, "topk_ids_of_layer, input_ids and positions are of different lengths")
        call = str(record.get("forward_pass_id")).encode() + token_T.tobytes() + position_T.tobytes()
        call += np.ascontiguousarray(index_TLK).tobytes()
        if call in seen:  # the ranks of tensor parallelism record the same
            continue
        seen.add(call)
        if mapping_LP is not None:
            index_TLK = _logical(file, index_TLK, mapping_LP)
        lengths = record.get("extend_seq_lens")
        prefill = lengths is not None
        length_N = _integers(file, record, "extend_seq_lens", 1) if prefill else np.ones(len(token_T), np.int32)
        if length_N.sum() != len(token_T) or length_N.min(initial=0) < 0:
            raise damaged(file, f"extend_seq_lens are {length_N.sum()} tokens, and there are {len(token_T)}")
        for end, length in zip(np.cumsum(length_N), length_N, strict=True):
            part = slice(end - length, end)
            phase_T = np.full(length, PREFILL if prefill else DECODE)
            documents.append(Document(index_TLK[part], "all", token_T[part], position_T[part], phase_T))
    return documents


def _logical(file: Path, index_TLK: np.ndarray, mapping_LP: np.ndarray) -> np.ndarray:
    layers, physical = mapping_LP.shape
    if index_TLK.shape[1] != layers or (index_TLK.size and index_TLK.max() >= physical):
        raise damaged(file, "topk_ids_of_layer has layers or experts that last_physical_to_logical_map has not")
    logical_TLK = mapping_LP[np.arange(layers)[:, None], index_TLK.clip(0)]
    return np.where(index_TLK < 0, NO_EXPERT, logical_TLK)
