"""What the readers share: the files of a path, the JSON in them, whole numbers, and the error for what is damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moectl.errors import InputError
from moectl.text import escape, shown

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def damaged(file: Path, what: str, line: int | None = None, fix: str = "Record it again.") -> InputError:
    """The error for a file that cannot be what it should be."""
    place = f"{escape(str(file))}, line {line}" if line else escape(str(file))
    return InputError(f"{place}: {escape(what)}.", "The trace is damaged, or of another kind.", fix)


class NeedsFact(ValueError):
    """What is read has to be completed with something that the file does not hold: `what`, and how to give it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix

    def of(self, file: Path, line: int | None = None) -> InputError:
        """The error for the user."""
        place = f"{escape(str(file))}, line {line}" if line else escape(str(file))
        return InputError(f"{place}: {self}.", "It is a fact of the model, and not in the file.", self.fix)


def members(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """A file, or the files of a directory and those below it, with such names, in order.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name.endswith(tuple(suffixes))]
    if not files:
        raise InputError(
            f"{escape(str(path))} holds no file that ends in {', '.join(suffixes)}.",
            "There is no trace to read.",
            "Give the file, or another directory.",
        )
    return files


def domain_of(file: Path, path: Path) -> str:
    """The folder below `path` that a file lies in, or else its own name: a file or a folder for each domain."""
    return file.stem if file.parent == path or file == path else file.parent.name


def raw(file: Path, size: int = -1) -> bytes:
    """The first bytes of a file, or all.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> InputError:
    """The error for a file that the system does not give."""
    return InputError(
        f"{escape(str(file))} cannot be read: {error.strerror}.", "", "Check the path and its permissions."
    )


def json_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file and their lines: one a line, or one or a list of them over all of it.

    Raises:
        InputError: it cannot be read, is not JSON, or holds something else than objects; the line is named.
    """
    try:
        with file.open("rb") as stream:
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            number, line = next(lines, (1, b""))
            records: Iterable[tuple[int, Any]]
            if line.rstrip().endswith(b"}"):
                records = ((number, _loads(file, line, number)) for number, line in chain([(number, line)], lines))
            else:
                value = _loads(file, line + stream.read())
                records = ((number, item) for item in (value if isinstance(value, list) else [value]))
            for number, record in records:
                if not isinstance(record, dict):
                    raise damaged(file, f"a JSON {type(record).__name__}, not an object", number)
                yield number, record
    except OSError as error:
        raise unreadable(file, error) from None


def first_record(path: Path, suffixes: Sequence[str] = JSON_SUFFIXES) -> dict[str, Any]:
    """The first object in the first such file; empty if there is none that can be read."""
    try:
        if path.is_file() and raw(path, 1) not in (b"{", b"["):
            return {}
        return next(json_records(members(path, suffixes)[0]))[1]
    except (InputError, StopIteration):
        return {}


def _loads(file: Path, text: bytes, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise damaged(file, "it is nested too deeply", line) from None
    except ValueError as error:
        at = getattr(error, "lineno", None) if line is None else line
        raise damaged(file, f"it is not JSON ({shown(str(error))})", at) from None


def whole_numbers(value: Any, dims: int) -> np.ndarray:
    """A list of lists, or an array, of whole numbers, as int16 or int32 of `dims` dimensions.

    Raises:
        ValueError: it is ragged, of something else, of another shape, or has numbers that int32 has not.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError("its lists are of different lengths") from None
    if array.size == 0 and array.ndim == 1:
        array = np.zeros((0,) * dims, np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError("it holds something else than whole numbers, or lists of different lengths")
    if array.ndim != dims:
        raise ValueError(f"it has {array.ndim} dimensions {array.shape}, not {dims}")
    least, largest = array.min(initial=0), array.max(initial=0)
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= least <= largest <= np.iinfo(kind).max:
            return array.astype(kind)
    raise ValueError(f"it holds the number {largest if largest > 0 else least}")
