"""A checkpoint: a read-only, validated view of a directory or Hub snapshot of safetensors.

Opening one reads config.json, the index and every header, and no weights; it executes and unpickles nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from moectl.checkpoint.header import TensorRef, escape, read_header
from moectl.checkpoint.location import Location, resolve
from moectl.errors import InputError

if TYPE_CHECKING:
    import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64_000_000
_SHARD_NAME = re.compile(r"[^\x00-\x1f/\\:]+\.safetensors")
_SIDE_FILES = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config"
    r"|chat_template)\.json|merges\.txt|vocab\.txt|.+\.jinja|.+\.tiktoken|(tokenizer|spiece|sentencepiece.*)\.model"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.\w+)?"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the directory read.
        name: what to call it: the Hub id or the directory's own name.
        commit: the Hub commit, or None for a plain directory.
        config: config.json, as it is.
        tensors: every tensor by name; shards in name order, tensors in file order.
        stats: (size, mtime in ns) of every weight file when it was opened, to notice a change while reading.
    """

    path: Path
    name: str
    commit: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    stats: dict[str, tuple[int, int]]
    warnings: list[str] = field(default_factory=list)

    @staticmethod
    def open(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
        """Open a directory, a Hub id or `hf://org/name@rev` and check all that can be checked without its weights.

        Raises:
            InputError: the checkpoint is missing, cut, inconsistent, a pickle, or points outside its directory.
            MachineError: the Hub cannot be reached.
            UsageError: a revision where there is none to choose.
        """
        return _open(resolve(model, revision))

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json: which family it belongs to."""
        return str(self.config["model_type"])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config and licence files, sorted: what goes along byte for byte."""
        return sorted(entry for entry in self.path.iterdir() if entry.is_file() and _SIDE_FILES.fullmatch(entry.name))

    def read(self, name: str) -> np.ndarray:
        """One whole tensor as a numpy (ml_dtypes) array.

        Raises:
            InputError: the file is shorter than when it was opened.
        """
        import numpy as np

        from moectl.checkpoint.dtypes import numpy_dtype

        ref = self.tensors[name]
        raw = b"".join(self.chunks(ref))
        return np.frombuffer(raw, dtype=numpy_dtype(ref.dtype)).reshape(ref.shape)

    @staticmethod
    def chunks(ref: TensorRef, size: int = 1 << 22) -> Iterator[bytes]:
        """The bytes of a tensor in pieces of at most `size`, read with pread (a cut file is an error, not a crash)."""
        descriptor = os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position, end = ref.offset, ref.offset + ref.nbytes
            while position < end:
                piece = os.pread(descriptor, min(size, end - position), position)
                if not piece:
                    raise changed(ref.file, f"ended while tensor {ref.name!r} was read")
                yield piece
                position += len(piece)
        finally:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Make sure the weight files are the ones that were opened.

        Raises:
            InputError: a file changed size or modification time since.
        """
        for name, before in self.stats.items():
            if _stat(self.path / name) != before:
                raise changed(self.path / name, "was modified while it was being read")


def changed(file: Path, what: str) -> InputError:
    """The error for a source that does not hold still."""
    return InputError(
        f"{escape(str(file))} {what}.",
        "The output could mix two versions of the model, so it was not published.",
        "Let whatever writes the source finish, then run the same command again.",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        InputError: it is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _bad(path, f"is larger than {MAX_JSON_BYTES // 10**6} MB, too large for a checkpoint's JSON")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _bad(path, "does not exist", "Give a directory that holds a Hugging Face checkpoint.") from None
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"is not valid JSON ({escape(str(error))[:120]})") from None
    if not isinstance(value, dict):
        raise _bad(path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _open(location: Location) -> Checkpoint:
    path = location.path
    if not path.is_dir():
        hint = "It is a single file: give the directory that holds it and its config.json."
        raise _bad(path, "is not a directory", hint)
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _bad(path / "config.json", "has no `model_type`", "Give a transformers checkpoint.")
    warnings: list[str] = []
    if (path / INDEX).exists():
        index = read_json(path / INDEX)
        weight_map = _weight_map(path / INDEX, index)
        shards = sorted(set(weight_map.values()))
    elif (path / SINGLE).exists():
        index, weight_map, shards = {}, None, [SINGLE]
    else:
        raise _no_weights(path)
    tensors: dict[str, TensorRef] = {}
    for shard in shards:
        if not (path / shard).exists():
            raise _bad(path / shard, "does not exist, but the index names it", "Fetch the missing shard.")
        for name, ref in read_header(path / shard).items():
            if name in tensors:
                raise _bad(path / shard, f"holds tensor {name!r}, which {tensors[name].file.name} holds too")
            tensors[name] = ref
    if weight_map is not None:
        _compare_with_index(path / INDEX, weight_map, tensors)
        total = sum(ref.nbytes for ref in tensors.values())
        metadata = index.get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated is not None and stated != total:
            warnings.append(f"{INDEX} states a total_size of {stated} bytes, but the tensors have {total}.")
    stats = {shard: _stat(path / shard) for shard in shards}
    return Checkpoint(path, location.name, location.commit, config, tensors, stats, warnings)


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "has no `weight_map` object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _bad(path, f"maps tensor {escape(name)!r} to a {type(shard).__name__}, not a file name")
        if shard.endswith(PICKLES):
            raise _pickled(path.parent / escape(shard))
        plain = PureWindowsPath(shard).name == shard and not shard.startswith(".")
        if not plain or not _SHARD_NAME.fullmatch(shard):
            raise _bad(path, f"maps tensor {escape(name)!r} to {escape(shard)!r}, not a file beside it")
    return weight_map


def _compare_with_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorRef]) -> None:
    absent = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
    if absent:
        name = absent[0]
        found = f"it is in {tensors[name].file.name}" if name in tensors else "no shard holds it"
        raise _bad(path, f"places {_some(absent)} in {weight_map[name]}, but {found}")
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise _bad(tensors[extra[0]].file, f"holds {_some(extra)}, which the index does not list")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(escape(name)) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return stat.st_size, stat.st_mtime_ns


def _no_weights(path: Path) -> InputError:
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES) or name.endswith(".bin.index.json")]
    if pickles:
        return _pickled(path / pickles[0])
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _bad(
            path,
            "is a torch.distributed checkpoint, whose metadata is a pickle",
            "Convert it where it was made with `torch.distributed.checkpoint` to safetensors, and give that.",
        )
    return _bad(path, f"holds neither {SINGLE} nor {INDEX}", "Give the directory of a safetensors checkpoint.")


def _pickled(path: Path) -> InputError:
    return InputError(
        f"{escape(str(path))} is a pickle, which is never opened.",
        "Unpickling can run code hidden in the file.",
        "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(new_directory).",
    )


def _bad(path: Path, what: str, fix: str = "") -> InputError:
    return InputError(
        f"{escape(str(path))} {what}.",
        "The checkpoint is incomplete or inconsistent, so nothing was done.",
        fix or "Download or write the checkpoint again.",
    )
