"""Statistics on disk: measured once, kept beside the output, and taken from there by a command that is run again.

They are what a plan needs to know of weights and data. With them a plan is data too: of several workers, or after an
interruption, every one plans the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.plan import source_identity
from moectl.checkpoint.source import Checkpoint

Compute = Callable[[], Mapping[str, np.ndarray]]


def kept(directory: Path, kind: str, decides: Mapping[str, Any], compute: Compute) -> Checkpoint:
    """The tensors that `compute` gives, as a safetensors file in `directory`; one that is there is taken as it is.

    Args:
        kind: what the file's name begins with.
        decides: all that the tensors follow from, as JSON; its hash is the rest of the name.
    """
    return kept_file(directory / kept_name(kind, decides), compute)


def kept_name(kind: str, decides: Mapping[str, Any]) -> str:
    """The name under which `kept` keeps statistics."""
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{key[:16]}.safetensors"


def kept_file(path: Path, compute: Compute, about: Mapping[str, str] | None = None) -> Checkpoint:
    """The same under a name of its own; `about` goes into the metadata of a file that is made."""
    if not path.exists():
        _write(path, compute(), about or {})
    return Checkpoint.of_file(path)


def identity(source: Checkpoint) -> dict[str, Any]:
    """What shows that a model is another or was changed, without reading its weights."""
    stats = {name: size if source.commit else (size, mtime) for name, (size, mtime) in source.stats.items()}
    return {"base": source_identity(source), "stats": stats}


def in_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same, row by row in memory: safetensors takes the bytes of an array as they lie, and some are transposed."""
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Write the file so that it is absent or whole; of two processes the first one's stays."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_bytes(save(in_order(arrays), metadata={"format": "moectl.statistics/1", **about}))
    try:
        FileSystem().rename_new(work, path)
    except FileExistsError:
        work.unlink()
