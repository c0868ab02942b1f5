"""What a layer was given or gave, as a file: tensors in tuples, lists and dicts, absent or whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from moectl.checkpoint.fs import FileSystem


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` into a file that is there with all of it, on the disk, or is not there; replaces one that is."""
    fs = FileSystem()
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.unlink(missing_ok=True)
    descriptor = fs.create(work)
    try:
        fs.write(descriptor, data)
        fs.sync(descriptor)
    except BaseException:
        work.unlink()
        raise
    finally:
        fs.close(descriptor)
    fs.rename(work, path)


def write_tree(path: Path, tree: Any) -> None:
    """Store tensors, None, numbers and text in tuples, lists and mappings.

    Raises:
        TypeError: there is something else among them.
    """
    tensors: dict[str, Tensor] = {}
    shape = _describe(tree, tensors)
    write_whole(path, save(tensors, {"tree": json.dumps(shape)}))


def read_tree(path: Path) -> Any:
    """What `write_tree` stored, on the CPU, in memory of its own; mappings come back as dicts."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shape = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tree"])
    return _rebuild(shape, load(data))


def _describe(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"dict": [[_describe(key, tensors), _describe(item, tensors)] for key, item in value.items()]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_describe(item, tensors) for item in value]}
    raise TypeError(f"{type(value).__name__} cannot be stored")


def _rebuild(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content].clone()  # where torch put it, so that matmuls see the same alignment every time
    if kind == "value":
        return content
    if kind == "dict":
        return {_rebuild(key, tensors): _rebuild(item, tensors) for key, item in content}
    items = [_rebuild(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
