"""moectl.json: what a checkpoint was made from and the hash of every tensor; and the check that it still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.plan import PROVENANCE, Plan, source_identity
from moectl.checkpoint.source import Checkpoint, is_plain_name, read_json
from moectl.errors import InputError
from moectl.text import escape, shown

SCHEMA = "moectl.provenance/1"


def provenance_text(plan: Plan, tensor_hashes: Mapping[str, str], file_hashes: Mapping[str, str]) -> str:
    """The text of moectl.json: the same for the same plan, wherever and by how many workers it was carried out."""
    document = {
        "schema": SCHEMA,
        "moectl": version("moectl"),
        "recipe": dict(plan.recipe),
        "sources": [source_identity(source) for source in plan.sources],
        "fingerprint": plan.fingerprint,
        "files": dict(sorted(file_hashes.items())),
        "tensors": {tensor.name: tensor_hashes[tensor.name] for tensor in plan.tensors},
    }
    return json.dumps(document, indent=2) + "\n"


def read_provenance(directory: Path) -> dict[str, Any]:
    """The provenance of a checkpoint made by moectl.

    Raises:
        InputError: there is none, or it is of a schema this version does not know.
    """
    path = directory / PROVENANCE
    if not path.exists():
        raise InputError(
            f"{escape(str(directory))} has no {PROVENANCE}.",
            "It was not made by moectl, so there are no hashes to compare with.",
            "Compare it with another model instead: moectl verify MODEL --against OTHER.",
        )
    document = read_json(path)
    hashes = document.get("tensors"), document.get("files")
    if document.get("schema") != SCHEMA or not all(isinstance(table, dict) for table in hashes):
        raise InputError(
            f"{escape(str(path))} is not of schema {SCHEMA}.", "", "Verify it with the version of moectl that made it."
        )
    for name in document["files"]:
        if not is_plain_name(name):
            raise InputError(
                f"{escape(str(path))} records {shown(name)!r}, not a file beside it.",
                "A file elsewhere is none of this checkpoint's, so it is not read.",
                "Fetch or make the checkpoint again.",
            )
    return document


def fingerprint_of(directory: Path) -> str | None:
    """The fingerprint of the plan that made a checkpoint; None when it was not made by moectl, or is not there."""
    try:
        fingerprint: str | None = read_provenance(directory).get("fingerprint")
    except InputError:
        return None
    return fingerprint


@dataclass(frozen=True, slots=True)
class Verification:
    """What re-hashing found. Names of tensors (or files) by what is wrong with them; `ok` when nothing is."""

    tensors: int
    nbytes: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as recorded."""
        return not (self.changed or self.missing or self.unexpected)


def verify_hashes(checkpoint: Checkpoint, on_bytes: Callable[[int], None] = lambda _: None) -> Verification:
    """Re-hash every tensor and recorded side file of a checkpoint against its moectl.json.

    Raises:
        InputError: the checkpoint has no readable moectl.json.
    """
    recorded = read_provenance(checkpoint.path)
    tensors: dict[str, str] = recorded["tensors"]
    found: dict[str, str] = {}
    with Hasher() as hasher:
        futures = {
            name: hasher.submit((Extent(ref.file, ref.offset, ref.nbytes),)) for name, ref in checkpoint.tensors.items()
        }
        for name, future in futures.items():
            found[name] = future.result().sha256
            on_bytes(checkpoint.tensors[name].nbytes)
    files = {
        name: sha256_file(checkpoint.path / name) for name in recorded["files"] if (checkpoint.path / name).is_file()
    }
    return Verification(
        tensors=len(found),
        nbytes=checkpoint.nbytes,
        changed=(*_differing(tensors, found), *_differing(recorded["files"], files)),
        missing=(*_absent(tensors, found), *_absent(recorded["files"], files)),
        unexpected=tuple(_absent(found, tensors)),
    )


def _differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterable[str]:
    return [name for name in found if name in recorded and found[name] != recorded[name]]


def _absent(wanted: Iterable[str], present: Mapping[str, str]) -> list[str]:
    return [name for name in wanted if name not in present]


def sha256_file(path: Path) -> str:
    """The hash of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
