"""vLLM and SGLang with --enable-return-routed-experts: their responses as JSON, or arrays saved from them.

    vLLM     `prompt_routed_experts` of the response and `routed_experts` of each choice, [T, L, K]: lists, or .npy in
             base64. Without the first, `routed_experts` has the prompt too. L counts MoE layers.
    SGLang   `routed_experts` in `meta_info` or `sgl_ext`: int32 in base64, flat [T - 1, L, K]. L counts all layers.
    arrays   .npy, .npz or .safetensors: each array [T, L, K] is a request, with token ids in `NAME.token_ids` where
             there are; or one request, named as vLLM names its parts.

The last generated token is never run, so it has no row. Sources: docs.vllm.ai/en/latest/training/routed_experts and
vllm-project/vllm pull request 28284; github.com/sgl-project/sglang, python/sglang/srt/state_capturer/routed_experts.py.
"""

from __future__ import annotations

import binascii
import io
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moectl.routing.ingest.files import (
    JSON_SUFFIXES,
    NeedsFact,
    damaged,
    domain_of,
    first_record,
    json_records,
    members,
    whole_numbers,
)
from moectl.routing.ingest.formats import Facts
from moectl.routing.ingest.recording import Source, recording
from moectl.text import shown
from moectl.traces.pack import Document
from moectl.traces.store import Recording
from moectl.traces.trace import DECODE, PREFILL

ARRAYS = (".npy", ".npz", ".safetensors")
PROMPT, GENERATED = "prompt_routed_experts", "routed_experts"
PROMPT_IDS = ("prompt_token_ids", "input_ids")
GENERATED_IDS = ("token_ids", "output_ids", "output_token_ids", "completion_token_ids")
NPY = b"\x93NUMPY"

_Json = dict[str, Any]


def recognises(path: Path) -> bool:
    """Arrays, or objects with `routed_experts` in them where an engine puts it."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if any(file.is_file() and file.suffix in ARRAYS for file in files):
        return True
    return any(_found(place, GENERATED) is not None for place in _places(first_record(path)))


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """One document per request and choice; a domain per file of many, per folder, or as a `domain` in it says.

    Raises:
        InputError: a record has no experts or ids of another number, a flat array's shape is not known, or as
            `recording`.
    """
    documents: list[Document] = []
    for file in members(path, (*ARRAYS, *JSON_SUFFIXES)):
        if file.suffix in ARRAYS:
            domain = path.stem if file.parent == path else domain_of(file, path)
            documents += _of_arrays(file, domain)
            continue
        for line, record in json_records(file):
            try:
                documents += _of_response(record, str(record.get("domain", domain_of(file, path))), facts)
            except NeedsFact as error:
                raise error.of(file, line) from None
            except ValueError as error:
                raise damaged(file, str(error), line) from None
    return {"decoder": recording(Source("routed_experts", path, facts), documents)}


def _of_arrays(file: Path, domain: str) -> list[Document]:
    try:
        arrays = _arrays(file)
        if GENERATED in arrays:
            return [_document(arrays, arrays, domain, None)]
        requests = [name for name, array in arrays.items() if array.ndim == 3]
        odd = [name for name in arrays if name not in requests and name.removesuffix(".token_ids") not in requests]
        if odd:
            raise ValueError(
                f"the array {odd[0]!r} has the shape {arrays[odd[0]].shape}, not [tokens, layers, experts]"
            )
        parts = ({GENERATED: arrays[name], "input_ids": arrays.get(f"{name}.token_ids")} for name in requests)
        return [_document(part, {}, domain, None) for part in parts]
    except ValueError as error:
        raise damaged(file, str(error)) from None


def _arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return {file.stem: np.array(np.load(file, mmap_mode="r", allow_pickle=False))}
    except Exception as error:  # of a damaged file numpy, zipfile, zlib and ast raise nearly anything
        raise ValueError(shown(f"{type(error).__name__}: {error}")) from None


def _of_response(record: _Json, domain: str, facts: Facts) -> Iterator[Document]:
    places = _places(record)
    if not any(_found(place, GENERATED) is not None for place in places):
        raise ValueError(f"there is no {GENERATED}")
    for place in places:
        yield _document(place, record, domain, facts)


def _places(record: _Json) -> list[_Json]:
    """The parts of a response that have a sequence each: its choices, or itself."""
    choices = record.get("choices", record.get("outputs"))
    if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        if len(choices) > 1 or _found(choices[0], GENERATED) is not None:
            return choices
        return [{**record, **choices[0]}]
    return [record]


def _found(place: _Json, name: str) -> Any:
    for holder in (place, place.get("meta_info"), place.get("sgl_ext")):
        if isinstance(holder, dict) and holder.get(name) is not None:
            return holder[name]
    return None


def _ids(holder: _Json, names: tuple[str, ...]) -> np.ndarray | None:
    found = next((holder[name] for name in names if holder.get(name) is not None), None)
    try:
        return None if found is None else whole_numbers(found, 1)
    except ValueError as error:
        raise ValueError(f"of token ids, {error}") from None


def _document(place: _Json, record: _Json, domain: str, facts: Facts | None) -> Document:
    """The parts of one sequence; `record` is the response around it."""
    prompt_ids, ids = _ids({**record, **place}, PROMPT_IDS), _ids(place, GENERATED_IDS)
    generated = _found(place, GENERATED)
    if generated is None:
        raise ValueError(f"one of the choices has no {GENERATED}")
    read_first, made = _counted(place, record, prompt_ids, ids)
    run = None if read_first is None or made is None else read_first + made - 1
    rows_TLK = _experts(generated, GENERATED, run, facts)
    prompt = record.get(PROMPT)
    prefill = len(rows_TLK) if read_first is None else read_first
    if prompt is not None:
        prompt_TLK = _experts(prompt, PROMPT, read_first, facts)
        prefill = len(prompt_TLK)
        if prompt_TLK.shape[1:] != rows_TLK.shape[1:] and len(rows_TLK) and prefill:
            raise ValueError(f"{PROMPT} has the shape {prompt_TLK.shape}, and {GENERATED} {rows_TLK.shape}")
        rows_TLK = np.concatenate([part for part in (prompt_TLK, rows_TLK) if len(part)] or [prompt_TLK])
    phase_T = np.where(np.arange(len(rows_TLK)) < prefill, PREFILL, DECODE)
    return Document(rows_TLK, domain, _tokens(len(rows_TLK), prompt_ids, ids, prompt is not None), phase_T=phase_T)


def _tokens(rows: int, prompt_ids: np.ndarray | None, ids: np.ndarray | None, prompt_routed: bool) -> np.ndarray | None:
    """The ids of the rows; the last generated token may have none."""
    if (ids is None and prompt_ids is None) or (prompt_ids is None and prompt_routed):
        return None
    token_T = np.concatenate([part for part in (prompt_ids, ids) if part is not None])
    if rows not in (len(token_T), len(token_T) - 1):
        raise ValueError(f"there are {rows} rows of experts, and {len(token_T)} token ids")
    return token_T[:rows]


def _counted(
    place: _Json, record: _Json, prompt_ids: np.ndarray | None, ids: np.ndarray | None
) -> tuple[int | None, int | None]:
    """How many tokens the prompt has and how many were generated, from their ids or as the engine says."""
    if prompt_ids is not None or ids is not None:
        return 0 if prompt_ids is None else len(prompt_ids), None if ids is None else len(ids)
    for counts in (place.get("meta_info"), record.get("usage") if len(_places(record)) == 1 else None):
        if isinstance(counts, dict):
            both = counts.get("prompt_tokens"), counts.get("completion_tokens")
            if type(both[0]) is int and type(both[1]) is int:
                return both[0], both[1]
    return None, None


def _experts(value: Any, name: str, rows: int | None, facts: Facts | None) -> np.ndarray:
    if not isinstance(value, str):
        return _named(value, name)
    try:
        data = b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is text, and no base64") from None
    if data.startswith(NPY):
        try:
            return _named(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False), name)
        except Exception as error:  # of a damaged header numpy and ast raise nearly anything
            raise ValueError(f"{name} is a damaged .npy: {shown(str(error))}") from None
    top_k, layers = (facts.top_k, facts.layers) if facts else (None, None)
    size = len(data) // 4
    if top_k and layers is None and rows and rows > 0:
        layers = size // (rows * top_k)
        if size != rows * top_k * layers:
            raise ValueError(f"{name} has {size} numbers, no multiple of {rows} tokens with {top_k} experts each")
    if not top_k or not layers:
        raise NeedsFact(
            f"{name} is a flat array of {size} numbers without its shape",
            "Give --top-k and, where the response does not count its tokens, --layers: all of them, dense ones too.",
        )
    if len(data) % (4 * layers * top_k):
        raise ValueError(f"{name} has {len(data)} bytes, no multiple of {layers} layers of {top_k} int32")
    return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)


def _named(value: Any, name: str) -> np.ndarray:
    try:
        return whole_numbers(value, 3)
    except ValueError as error:
        raise ValueError(f"of {name}, {error}") from None
