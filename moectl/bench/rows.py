"""A row of a result: one peer in one cell, and what follows from its time, its routing and the roof."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from moectl.bench import device as machine
from moectl.bench import roofline
from moectl.bench.accuracy import TOLERANCE
from moectl.bench.peers import PEERS, Unavailable
from moectl.bench.shapes import Shape
from moectl.errors import CheckFailed
from moectl.text import shown


@dataclass(frozen=True)
class Row:
    """One peer in one cell; numbers are None where they were not measured. Times in ms, memory in bytes.

    `floor_ms` is the least time for the routing that was drawn on the roof that was measured, `kernels_floor_ms` the
    same with a kernel per step; `other_clock_ms` is the median CPU time, or with --clock cpu that of the wall; errors
    are relative, see `accuracy`; `padding_waste` is the share of rows that hold no token.
    """

    model: str
    dtype: str
    what: str
    tokens: int
    backend: str
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    other_clock_ms: float | None = None
    reps: int = 0
    tflops: float | None = None
    gbs: float | None = None
    floor_ms: float | None = None
    kernels_floor_ms: float | None = None
    percent_of_floor: float | None = None
    bound: str | None = None
    peak_bytes: int | None = None
    active_experts: float | None = None
    imbalance: float | None = None
    block_m: int | None = None
    padding_waste: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    check: str | None = None
    speedup: float | None = None
    speedup_over: str | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What is measured: the same in two runs with the same options."""
        return (self.model, self.dtype, self.what, self.tokens, self.backend)


def finish(row: Row, drawn: list[list[int]], shape: Shape, roof: machine.Roof) -> Row:
    """Put what follows from the routing and the roof into a row: means over the routings that were drawn.

    `drawn` has the rows per expert of each set of inputs.
    """
    itemsize = machine.DTYPES[row.dtype].itemsize
    limits = roof.tflops * 1e12, roof.gbs * 1e9
    floors, floors_by_kernel, flops, nbytes = [], [], [], []
    for counts in drawn:
        arguments = (row.what, shape, row.tokens, sum(counts), sum(count > 0 for count in counts), itemsize)
        passes = roofline.ideal(*arguments)
        floors.append(1000 * sum(one.floor(*limits) for one in passes))
        floors_by_kernel.append(1000 * sum(one.floor(*limits) for one in roofline.kernels(*arguments).values()))
        flops.append(sum(one.flops for one in passes))
        nbytes.append(sum(one.nbytes for one in passes))
    found: dict[str, Any] = {
        "floor_ms": mean(floors),
        "kernels_floor_ms": mean(floors_by_kernel),
        "bound": roofline.Work(mean(flops), mean(nbytes)).bound(*limits),
        "active_experts": mean([sum(count > 0 for count in counts) for counts in drawn]),
        "imbalance": mean([roofline.imbalance(counts) for counts in drawn]),
    }
    if row.block_m is not None:
        found["padding_waste"] = mean([roofline.padding_waste(counts, row.block_m) for counts in drawn])
    if row.p50_ms is not None:
        found["tflops"] = mean(flops) / row.p50_ms / 1e9
        found["gbs"] = mean(nbytes) / row.p50_ms / 1e6
        found["percent_of_floor"] = 100 * found["floor_ms"] / row.p50_ms
    return replace(row, **found)


def compare(rows: list[Row]) -> list[Row]:
    """Speed-ups within each cell over its first peer that was measured, others' before ours."""
    out = []
    for row in rows:
        cell = [other for other in rows if other.key[:4] == row.key[:4] and other.p50_ms]
        cell.sort(key=lambda other: other.backend in PEERS and PEERS[other.backend].ours)
        if row.p50_ms and cell and (base := cell[0].p50_ms):
            row = replace(row, speedup=base / row.p50_ms, speedup_over=cell[0].backend)
        out.append(row)
    return out


def require_good(document: dict[str, Any]) -> None:
    """Raises CheckFailed, naming them, if rows are further from float64 than the tolerance."""
    bad = [row for row in document["rows"] if row["check"] == "failed"]
    if bad:
        named = "; ".join(
            f"{row['backend']} {row['model']} {row['dtype']} {row['what']} T={row['tokens']}: "
            f"max {row['max_error']:.2g}, rms {row['rms_error']:.2g}"
            for row in bad[:5]
        )
        raise CheckFailed(
            f"{len(bad)} of {len(document['rows'])} rows compute something else: {named}.",
            f"Allowed in {bad[0]['dtype']}: {TOLERANCE[bad[0]['dtype']]:g} of the largest value, a third of it rms.",
            "A time of a wrong result means nothing; leave the peer out with --backend, or see --no-check.",
        )


def explain(error: BaseException) -> str:
    """The reason of a row: one line of an exception."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]} is not installed"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, Unavailable):
        return shown(first)
    first = re.sub(r"\s*\(/[^)]*\)", "", first)  # an ImportError names its file, which is nobody else's business
    return shown(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def mean(numbers: list[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)
