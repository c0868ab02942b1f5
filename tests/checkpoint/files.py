"""Small checkpoints made by hand, byte by byte, for tests that need exactly the wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "uint8": "U8"}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A well-formed safetensors file, written independently of the project."""
    entries, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        entries[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return with_header(json.dumps(entries).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def checkpoint(
    directory: Path, shards: dict[str, dict[str, np.ndarray]] | dict[str, np.ndarray], **config: Any
) -> Path:
    """A checkpoint directory: {shard: {name: array}} with an index, or {name: array} in one file."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if all(isinstance(value, np.ndarray) for value in shards.values()):
        (directory / "model.safetensors").write_bytes(safetensors_bytes(shards))  # type: ignore[arg-type]
        return directory
    weight_map = {}
    for shard, tensors in shards.items():
        (directory / shard).write_bytes(safetensors_bytes(tensors))  # type: ignore[arg-type]
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def random_array(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
