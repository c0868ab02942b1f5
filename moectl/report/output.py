"""Results on stdout as a table, TSV or JSON; notes, warnings and progress on stderr.

stdout is a table on a terminal and TSV in a pipe (never cut to a width); `--json` is one document with a `schema`.
Names come from files, so control characters are escaped and Rich markup is never interpreted.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moectl.errors import UsageError
from moectl.text import escape

Cell = str | int | float | None


def emit_json(schema: str, document: dict[str, Any]) -> None:
    """Print one JSON document; numbers that JSON cannot hold (NaN, infinities) become null."""
    sys.stdout.write(json_text(schema, document))


def json_text(schema: str, document: dict[str, Any]) -> str:
    """What `emit_json` prints, for a file."""
    return json.dumps({"schema": schema, **_finite(document)}, indent=2, default=str, allow_nan=False) + "\n"


def emit_path(path: Path) -> None:
    """Print the path of what was made, byte for byte, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.buffer.flush()


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "") -> None:
    """Print rows under column names: aligned on a terminal, tab-separated with one header line in a pipe."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            sys.stdout.write("\t".join(escape(plain(cell)) for cell in row) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, box=None, pad_edge=False, header_style="bold")
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    for name, is_number in zip(columns, numeric, strict=True):
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape(plain(cell))) for cell in row))
    Console(highlight=False).print(table)


def plain(cell: Cell) -> str:
    """A cell as text: integers whole, floats to six significant digits, None empty."""
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def note(text: str, *, quiet: bool = False) -> None:
    """Say something to the person on stderr."""
    if not quiet:
        sys.stderr.write(escape_lines(text) + "\n")


def warn(text: str) -> None:
    """Say on stderr what the person should know even in quiet mode."""
    sys.stderr.write("warning: " + escape_lines(text) + "\n")


def escape_lines(text: str) -> str:
    """`escape`, keeping the line breaks that the message itself has."""
    return "\n".join(escape(line) for line in text.split("\n"))


def size(nbytes: float) -> str:
    """Bytes for a person: decimal units, three significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def parse_size(text: str, option: str = "--shard-size") -> int:
    """What an option says in bytes, from `123`, `500MB`, `5GB`, `4GiB`.

    Raises:
        UsageError: it is not a size.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "tb": 10**12,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    }
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in units:
        raise UsageError(
            f"{option} {escape(text)!r} is not a size.", "", "Write bytes, or a number with kB, MB, GB, TB or GiB."
        )
    return int(float(match[1]) * units[match[2].lower()])


def count(number: float) -> str:
    """Parameters for a person: 8.03B, 46.7B, 124M."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}T"


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs; yields a function to call with how many `unit`s were done.

    Nothing is drawn when stderr is not a terminal, TERM is dumb, or `quiet`.
    """
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counters = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (BarColumn(), *counters, TimeRemainingColumn())
    with Progress("[progress.description]{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
