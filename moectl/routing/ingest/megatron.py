"""Megatron-LM: `router_trace_rank{N}.jsonl`, a line per step, layer and rank with top_indices [T, K].

Source: github.com/NVIDIA/Megatron-LM, megatron/core/transformer/moe/router_trace.py (pull request 5220). What it does
not say decides what is off: rows are [sequence, batch] laid flat, so neighbouring rows are of different sequences; a
routing map gives experts in the order of their numbers; and with pipeline parallelism a stage counts its own layers
from 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from moectl.routing.ingest.files import damaged, first_record, json_records, whole_numbers
from moectl.routing.ingest.formats import Facts
from moectl.routing.ingest.recording import Source, recording
from moectl.traces.pack import UNKNOWN, Document
from moectl.traces.store import Recording

PATTERN = "router_trace_rank*.jsonl"

_Layer = tuple[int, int]
"""Which depth of multi-token prediction (0 in the decoder), and which layer of it."""

_Calls = dict[tuple[int, int], dict[_Layer, np.ndarray]]
"""For every step and micro-batch of it the experts [T, K] of each layer."""


def recognises(path: Path) -> bool:
    """A directory with such files, or objects with `top_indices`."""
    if path.is_dir():
        return next(path.rglob(PATTERN), None) is not None
    return "top_indices" in first_record(path)


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """One document per rank, step and micro-batch: streams `decoder` and, for multi-token prediction, `mtp`.

    Ranks that hold the same choices throughout (tensor parallelism) are read once.

    Raises:
        InputError: a line misses a field or contradicts itself, calls have different layers or tokens, or as
            `recording`.
    """
    ranks: dict[str, dict[Path, _Calls]] = defaultdict(dict)
    copies = []
    for file in sorted(path.rglob(PATTERN)) if path.is_dir() else [path]:
        for block, calls in _calls(file).items():
            if any(_same(calls, other) for other in ranks[block].values()):
                copies.append(f"{file.name} ({block})")
            else:
                ranks[block][file] = calls
    if not ranks:
        raise damaged(path, "it holds no records")
    return {block: _recording(Source("megatron", path, facts), block, ranks[block], copies) for block in sorted(ranks)}


def _calls(file: Path) -> dict[str, _Calls]:
    blocks: dict[str, _Calls] = defaultdict(lambda: defaultdict(dict))
    times: Counter[tuple[str, int, _Layer]] = Counter()
    for line, record in json_records(file):
        try:
            index_TK = whole_numbers(record.get("top_indices"), 2)
        except ValueError as error:
            raise damaged(file, f"of top_indices, {error}", line) from None
        step, layer, tokens = (_number(file, line, record, name) for name in ("step", "layer", "num_tokens"))
        block = "mtp" if "mtp_idx" in record else "decoder"
        place = (_number(file, line, record, "mtp_idx") if block == "mtp" else 0, layer)
        if len(index_TK) != tokens or record.get("topk", index_TK.shape[1]) != index_TK.shape[1]:
            shape = f"{len(index_TK)} tokens of {index_TK.shape[1]} experts"
            raise damaged(
                file, f"top_indices has {shape}, against num_tokens {tokens}, topk {record.get('topk')}", line
            )
        call = (step, times[block, step, place])
        times[block, step, place] += 1
        if any(len(other) != tokens for other in blocks[block][call].values()):
            raise damaged(file, f"layer {layer} has {tokens} tokens, and other layers of step {step} others", line)
        blocks[block][call][place] = index_TK
    return blocks


def _recording(source: Source, block: str, files: dict[Path, _Calls], copies: list[str]) -> Recording:
    side_by_side = "a micro-batch's sequences lie side by side, so which token came before is not known"
    source.off |= dict.fromkeys(("repetition", "context_independence"), side_by_side)
    if copies:
        source.warnings.append(f"Read once, for they hold the choices of another rank: {', '.join(copies)}.")
    places = sorted({place for calls in files.values() for layers in calls.values() for place in layers})
    documents = []
    for file, calls in files.items():
        domain = "all" if file.parent in (source.path, source.path.parent) else file.parent.name
        for (step, _), layers in calls.items():
            if len(layers) != len(places):
                missing = next(place for place in places if place not in layers)
                raise damaged(
                    file,
                    f"step {step} has no layer {missing[1]}, which other steps or ranks have",
                    fix="Read the files of each pipeline stage by themselves; leave out a step that was cut short.",
                )
            if len({layers[place].shape for place in places}) > 1:
                raise damaged(file, f"the layers of step {step} have different numbers of experts per token")
            index_TLK = np.stack([layers[place] for place in places], 1)
            unknown_T = np.full(len(index_TLK), UNKNOWN)
            documents.append(Document(index_TLK, domain, position_T=unknown_T))
    numbers = range(len(places)) if block == "mtp" else [layer for _, layer in places]
    return recording(source, documents, numbers, block)


def _same(one: _Calls, other: _Calls) -> bool:
    return one.keys() == other.keys() and all(
        one[call].keys() == other[call].keys()
        and all(np.array_equal(index_TK, other[call][place]) for place, index_TK in one[call].items())
        for call in one
    )


def _number(file: Path, line: int, record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise damaged(file, f"{name} is {value!r}, not a whole number from 0", line)
    return value
