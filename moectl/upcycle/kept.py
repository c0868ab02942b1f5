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


def kept(
    directory: Path, kind: str, decides: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
) -> Checkpoint:
    """The tensors that `compute` gives, as a safetensors file in `directory`; one that is there is taken as it is.

    Args:
        kind: what the file's name begins with.
        decides: all that the tensors follow from, as JSON; its hash is the rest of the name.
    """
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    path = directory / f"{kind}-{key[:16]}.safetensors"
    if not path.exists():
        _write(path, compute())
    return Checkpoint.of_file(path)


def identity(source: Checkpoint) -> dict[str, Any]:
    """What shows that a model is another or was changed, without reading its weights."""
    stats = {name: size if source.commit else (size, mtime) for name, (size, mtime) in source.stats.items()}
    return {"base": source_identity(source), "stats": stats}


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the file so that it is absent or whole; of two processes the first one's stays."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_bytes(save(dict(arrays), metadata={"format": "moectl.statistics/1"}))
    try:
        FileSystem().rename_new(work, path)
    except FileExistsError:
        work.unlink()
