"""OLMoE's analysis script: jsonl of {input_ids [T], predicted_token_ids [T], exp_ids [T, K, L]}, a window a line.

Source: github.com/allenai/OLMoE, scripts/run_moe_analysis.py, `run`: experts are stacked along the *last* axis by
layer, and stand in the order of the router's logits.
"""

from __future__ import annotations

from pathlib import Path

from moectl.routing.ingest.files import (
    JSON_SUFFIXES,
    damaged,
    domain_of,
    first_record,
    json_records,
    members,
    whole_numbers,
)
from moectl.routing.ingest.formats import Facts
from moectl.routing.ingest.recording import Source, recording
from moectl.traces.pack import Document
from moectl.traces.store import Recording


def recognises(path: Path) -> bool:
    """Objects with `exp_ids`."""
    return "exp_ids" in first_record(path)


def read(path: Path, facts: Facts) -> dict[str, Recording]:
    """One document per line; its domain is the file's name, or the folder's below `path`.

    Raises:
        InputError: a line misses its ids or its parts are of different lengths, or as `recording`.
    """
    documents = []
    for file in members(path, JSON_SUFFIXES):
        for line, record in json_records(file):
            try:
                index_TLK = whole_numbers(record.get("exp_ids"), 3).swapaxes(1, 2)
                token_T = whole_numbers(record.get("input_ids"), 1)
                predicted = record.get("predicted_token_ids")
                predicted_T = None if predicted is None else whole_numbers(predicted, 1)
            except ValueError as error:
                raise damaged(file, f"of exp_ids, input_ids or predicted_token_ids, {error}", line) from None
            if not len(index_TLK) == len(token_T) == len(token_T if predicted_T is None else predicted_T):
                raise damaged(file, "exp_ids, input_ids and predicted_token_ids are of different lengths", line)
            documents.append(Document(index_TLK, domain_of(file, path), token_T, predicted_T=predicted_T))
    return {"decoder": recording(Source("olmoe", path, facts), documents)}
