"""A checkpoint: a read-only, validated view of a directory or Hub snapshot of safetensors.

Opening one reads config.json, the index and every header, and no weights; it executes and unpickles nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from moectl.checkpoint.header import TensorRef, parse_json, read_header
from moectl.checkpoint.location import Location, resolve
from moectl.errors import InputError
from moectl.text import escape, shown

if TYPE_CHECKING:
    import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64_000_000
MAX_NAME_BYTES = 255
_MODEL_TYPE = re.compile(r"[\w.-]{1,100}", re.ASCII)
_CODE_FIELDS = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "_attn_implementation",
    "_attn_implementation_internal",
)
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
        file: of a safetensors file that is a source by itself; its `commit` is then the sha256 of its bytes.
    """

    path: Path
    name: str
    commit: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    stats: dict[str, tuple[int, int]]
    warnings: list[str] = field(default_factory=list)
    file: Path | None = None

    @staticmethod
    def of_file(file: Path) -> Checkpoint:
        """One safetensors file by itself, such as an adapter or statistics: tensors for a plan, and no config.

        Raises:
            InputError: it is missing, or not a safetensors file.
        """
        tensors = read_header(file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Checkpoint(file.parent, file.stem, digest, {}, tensors, {file.name: _stat(file)}, file=file)

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
        try:
            descriptor = os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise changed(ref.file, f"disappeared before tensor {shown(ref.name)!r} was read") from None
        try:
            position, end = ref.offset, ref.offset + ref.nbytes
            while position < end:
                piece = os.pread(descriptor, min(size, end - position), position)
                if not piece:
                    raise changed(ref.file, f"ended while tensor {shown(ref.name)!r} was read")
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
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "is not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise _bad(path, f"is larger than {MAX_JSON_BYTES // 10**6} MB, too large for a checkpoint's JSON")
        value = parse_json(path.read_text(encoding="utf-8"))
    except InputError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise _bad(path, "does not exist", "Give a directory that holds a Hugging Face checkpoint.") from None
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    except ValueError as error:
        raise _bad(path, f"is not valid JSON ({shown(str(error))})") from None
    if not isinstance(value, dict):
        raise _bad(path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _open(location: Location) -> Checkpoint:
    path = location.path
    if not path.is_dir():
        hint = "It is a single file: give the directory that holds it and its config.json."
        raise _bad(path, "is not a directory", hint)
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        what = f"has model_type = {shown(model_type)!r}" if model_type else "has no `model_type`"
        raise _bad(path / "config.json", what, "Give a transformers checkpoint.")
    warnings = _ignored_code(path, config)
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
                raise _bad(path / shard, f"holds tensor {shown(name)!r}, which {tensors[name].file.name} holds too")
            tensors[name] = ref
    if weight_map is not None:
        _compare_with_index(path / INDEX, weight_map, tensors)
        total = sum(ref.nbytes for ref in tensors.values())
        metadata = index.get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated is not None and stated != total:
            warnings.append(f"{INDEX} states a total_size of {shown(stated)} bytes, but the tensors have {total}.")
    stats = {shard: _stat(path / shard) for shard in shards}
    unread = sorted(entry.name for entry in path.glob("*.safetensors") if entry.name not in stats)
    if unread:
        warnings.append(f"{_some(unread)} in {escape(str(path))} are not read, but transformers may load them instead.")
    return Checkpoint(path, location.name, location.commit, config, tensors, stats, warnings)


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "has no `weight_map` object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _bad(path, f"maps tensor {shown(name)!r} to a {type(shard).__name__}, not a file name")
        if shard.endswith(PICKLES):
            raise _pickled(path.parent / shown(shard))
        if not is_plain_name(shard) or shard.startswith(".") or not shard.endswith(".safetensors"):
            raise _bad(path, f"maps tensor {shown(name)!r} to {shown(shard)!r}, not a file beside it")
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a name found in a file means a file beside it: no path, no drive, nothing unprintable, not too long."""
    short = name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES
    return short and PureWindowsPath(name).name == name and ":" not in name and name not in ("", ".", "..")


def _ignored_code(path: Path, config: dict[str, Any]) -> list[str]:
    fields = [name for name in _CODE_FIELDS if config.get(name)]
    if not fields:  # without these no reader runs the .py files that many repositories hold
        return []
    files = sorted(entry.name for entry in path.glob("*.py"))
    found = ", ".join(shown(name) for name in (*fields, *files[: 5 - len(fields)]))
    return [f"{escape(str(path))} brings code of its own ({found}); it is ignored, never run and never copied."]


def _compare_with_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorRef]) -> None:
    absent = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
    if absent:
        name = absent[0]
        found = f"it is in {tensors[name].file.name}" if name in tensors else "no shard holds it"
        raise _bad(path, f"places {_some(absent)} in {shown(weight_map[name])}, but {found}")
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise _bad(tensors[extra[0]].file, f"holds {_some(extra)}, which the index does not list")


def _some(names: list[str]) -> str:
    first = ", ".join(repr(shown(name)) for name in names[:5])
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


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
