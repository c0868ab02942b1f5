"""Readers of local files: from a path to the texts in it. A new format is one function and one entry in `READERS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moectl.errors import InputError, MachineError
from moectl.text import escape

_BATCH_ROWS = 256


def read_text(path: Path) -> Iterator[str]:
    """A text file, which is one document; line ends stay as they are.

    Raises:
        InputError: it cannot be read or is not UTF-8; the message names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        yield raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _bad(path, f"line {line}", "is not UTF-8", "Save the file as UTF-8.") from None


def read_jsonl(path: Path) -> Iterator[str]:
    """The `text` of each line of a file of JSON objects; empty lines are skipped.

    Raises:
        InputError: it cannot be read, or a line is not UTF-8, not a JSON object, or without a text.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield _text_of(path, f"line {number}", _json_object(path, number, line))
    except OSError as error:
        raise _unreadable(path, error) from None


def read_parquet(path: Path) -> Iterator[str]:
    """The `text` column of a parquet file, a few rows in memory at a time.

    Raises:
        InputError: it cannot be read, is not parquet, or has no column of texts.
        MachineError: pyarrow, which comes with `moectl[data]`, is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MachineError(
            f"{escape(str(path))} cannot be read without pyarrow.",
            "Parquet files are read with it, and it is not installed.",
            "pip install 'moectl[data]'",
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise _without_text(path, "its columns", names)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    row += 1
                    yield _text_of(path, f"row {row}", {"text": text})
    except (ArrowException, UnicodeDecodeError) as error:
        raise _bad(
            path, f"row {row + 1}", f"is damaged ({escape(str(error))[:120]})", "Write the file again."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": read_jsonl,
    ".txt": read_text,
    ".md": read_text,
    ".parquet": read_parquet,
}


def read_directory(directory: Path) -> Iterator[str]:
    """The texts of every file below a directory that has a reader, in order of path; hidden ones are skipped.

    Raises:
        InputError: no file in it has a reader, or one of them cannot be read.
    """
    files = [
        file
        for file in sorted(directory.rglob("*"))
        if file.suffix in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    ]
    if not files:
        raise InputError(
            f"{escape(str(directory))} holds no data file.",
            f"A data file ends in one of {', '.join(READERS)}.",
            "Give a directory with at least one such file.",
        )
    for file in files:
        yield from READERS[file.suffix](file)


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise _bad(path, where, "is not UTF-8", "Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, where, f"is not JSON ({escape(str(error))[:120]})") from None
    if not isinstance(value, dict):
        raise _bad(path, where, f"is a JSON {type(value).__name__}, not an object")
    return value


def _text_of(path: Path, where: str, record: dict[str, Any]) -> str:
    if "text" not in record:
        raise _without_text(path, where, list(record))
    text = record["text"]
    if not isinstance(text, str):
        raise _bad(path, where, f"has a `text` of type {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(path, where, "has half of a surrogate pair in its `text`, which no UTF-8 can hold") from None
    return text


def _without_text(path: Path, where: str, names: list[str]) -> InputError:
    if "messages" in names:
        fix = "Apply a chat template to the `messages` and write the result as `text`."
    else:
        fix = "Name the field that holds the document `text`."
    shown = ", ".join(escape(name) for name in names[:8]) or "none"
    return _bad(path, where, f"has no `text` (fields: {shown})", fix)


def _unreadable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or escape(str(error))[:120]
    return InputError(f"{escape(str(path))} cannot be read: {reason}.", "", "Check the path and its permissions.")


def _bad(path: Path, where: str, what: str, fix: str = "") -> InputError:
    return InputError(
        f"{escape(str(path))}, {where}, {what}.",
        "A document that is skipped silently would change the result, so nothing was used.",
        fix or 'A document is a JSON line such as {"text": "..."}, or a row of a parquet column `text`.',
    )
