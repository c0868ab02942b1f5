"""Launch choices: one dataclass, tables per architecture keyed by rows per expert, and the user's own.

A line of a table is good up to so many rows per expert, never tokens alone: sixteen tokens are much for one of 8
experts and nothing for one of 256. The user's table for this very device comes first, then the packaged one of its
architecture.
Nothing is timed here and nothing on a first call: `moectl bench layer --tune` writes the user's table.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_kernels.target import Target

KERNELS = ("up", "down", "dact", "dx", "dw")


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
        block_m: rows of a tile; for "dw", whose rows are output rows of the weight, its own; else that of the line.
        block_n: columns of a tile.
        block_k: the step along the contraction, in elements of two bytes.
        warps, stages: num_warps and num_stages of Triton.
        group_m: row blocks that run side by side before the next column, for the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8

    def fitted(self, itemsize: int) -> Launch:
        """The choice for elements of `itemsize` bytes: products of float32 hold their operands in registers too."""
        if itemsize == 2:
            return self
        return replace(self, block_n=min(self.block_n, 32), block_k=16)


@dataclass(frozen=True)
class Line:
    """The choices for a number of rows per expert.

    Attributes:
        rows: the line is good up to this mean number of routed rows per expert.
        block_m: rows of the row blocks of the dispatch, which all kernels but "dw" share.
        launches: one Launch for each of KERNELS.
    """

    rows: float
    block_m: int
    launches: dict[str, Launch]

    def __getitem__(self, kernel: str) -> Launch:
        return self.launches[kernel]


def choose(target: Target, rows: int, experts: int) -> Line:
    """The line for `rows` routed rows over `experts` experts on a device."""
    lines = table(target)
    return next((line for line in lines if rows <= line.rows * experts), lines[-1])


@cache
def table(target: Target) -> tuple[Line, ...]:
    """The lines in use for a device: the user's own or the packaged ones."""
    own = user_table(target.name)
    return parse(json.loads(own.read_text())) if own.is_file() else packaged(target.arch)


def packaged(arch: str) -> tuple[Line, ...]:
    """The lines that come with the package for an architecture."""
    return parse(json.loads((files(__package__) / "tables" / f"{arch}.json").read_text()))


def user_table(name: str) -> Path:
    """Where the table of the device called `name` is, if the user has tuned it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "moectl" / "tuning" / f"{name.replace(' ', '_').replace('/', '_')}.json"


def parse(document: list[dict[str, Any]]) -> tuple[Line, ...]:
    """Lines from JSON: `[{"rows": 16, "block_m": 16, "up": {"block_n": 64, ...}, ...}, ...]`, rows rising.

    Raises:
        ValueError: a kernel is missing, or the lines are not in order.
    """
    lines = []
    for entry in document:
        missing = [kernel for kernel in KERNELS if kernel not in entry]
        if missing or "rows" not in entry or "block_m" not in entry:
            raise ValueError(f"a line of a tuning table needs rows, block_m and {', '.join(KERNELS)}; lacks {missing}")
        launches = {kernel: Launch(**{"block_m": entry["block_m"], **entry[kernel]}) for kernel in KERNELS}
        lines.append(Line(float(entry["rows"]), entry["block_m"], launches))
    if not lines or [line.rows for line in lines] != sorted({line.rows for line in lines}):
        raise ValueError("the lines of a tuning table have to be in order of rows, and there has to be one")
    return tuple(lines)


def as_json(lines: tuple[Line, ...]) -> list[dict[str, Any]]:
    """What `parse` reads."""
    return [
        {"rows": line.rows, "block_m": line.block_m, **{kernel: asdict(line[kernel]) for kernel in KERNELS}}
        for line in lines
    ]


def save(name: str, lines: tuple[Line, ...]) -> Path:
    """Write the user's table for a device, and use it from now on."""
    path = user_table(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(as_json(lines), indent=1) + "\n")
    scratch.replace(path)
    table.cache_clear()
    return path


@dataclass(frozen=True)
class Ternary:
    """How ternary experts are multiplied; chosen by arithmetic, for no device has timed them yet.

    Attributes:
        lanes: codewords of a tile, times the tokens that share it.
        warps: num_warps of Triton.
        tokens: rows of one expert that share a tile, where there are several tokens.
        rows_of_an_expert: up to so many a hit expert, codewords are multiplied; for more it is decoded.
        most_rows: up to so many routed rows; every program reads all their experts.
    """

    lanes: int = 256
    warps: int = 4
    tokens: int = 4
    rows_of_an_expert: float = 4.0
    most_rows: int = 1024

    def tile(self, codes_of_a_row: float, tokens: int) -> tuple[int, int]:
        """Rows and codewords of a tile: the fewest idle lanes, where a row is a tenth longer than the mean one.

        A row stays within one warp, so that prefix sums need no barrier; a step along it costs about as much as 8
        codewords more.
        """
        steps = {width: -(-max(1.0, 1.1 * codes_of_a_row) // width) for width in (32, 16)}
        width = min(steps, key=lambda width: steps[width] * (width + 8))
        return max(32 * self.warps, self.lanes // tokens) // width, width


TERNARY = {"interpreter": Ternary(lanes=1024, most_rows=64)}


def ternary(target: Target) -> Ternary:
    """The choice for a device."""
    return TERNARY.get(target.arch, Ternary())
