"""Measure the stages of our own layer one by one: `moectl bench kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.clock import Subject, interleave
from moectl.bench.inputs import Batch, Weights, make_batches, make_weights
from moectl.bench.roofline import Work
from moectl.bench.rows import explain, mean
from moectl.bench.shapes import Shape
from moectl.bench.stages import STAGES
from moectl.bench.sweep import OnCell, OnPart, Roofs, Settings, cells_of, sweep

Row = dict[str, Any]


def measure(settings: Settings, on_cell: OnCell = lambda _title: None, on_part: OnPart | None = None) -> dict[str, Any]:
    """One row per shape, dtype, number of tokens and stage; a stage that fails is a row with a reason.

    `on_part` as in `sweep`.

    Raises:
        MachineError: no such device, or the weights do not fit.
    """
    device = machine.pick(settings.device)

    def prepare(shape: Shape, name: str) -> Callable[[int], list[tuple[Row, list[Work]]]]:
        dtype = machine.DTYPES[name]
        weights = make_weights(shape, dtype, device, settings.seed, train=True)

        def measured(tokens: int) -> list[tuple[Row, list[Work]]]:
            draw = routing.make(settings.routing, shape)
            batches = make_batches(shape, tokens, dtype, device, draw, settings.seed + tokens, train=True)
            start = {"model": shape.name, "dtype": name, "tokens": tokens}
            rows = []
            for stage, fields in _measure_stages(weights, batches, settings, device):
                work = STAGES[stage].work
                done = [work(weights[0], batch) for batch in batches] if work else []
                rows.append(({**start, "stage": stage, **fields}, done))
            return rows

        return measured

    def end(rows: list[tuple[Row, list[Work]]], roofs: Roofs) -> dict[str, Any]:
        return {"rows": [_finish(row, done, roofs[row["dtype"]]) for row, done in rows]}

    said = {"routing": settings.routing, "seed": settings.seed, "clock": settings.clock}
    found = cells_of(settings, on_cell, prepare)
    return sweep(settings, device, "kernels", said, found, end, on_part)


def _measure_stages(
    weights: list[Weights], batches: list[Batch], settings: Settings, device: torch.device
) -> list[tuple[str, Row]]:
    """One stage after the other: they are no rivals, and what each needs is made once and let go again."""
    clock = machine.clock_of(device, settings.clock)
    found: list[tuple[str, Row]] = []
    for name in (name for name, stage in STAGES.items() if device.type in stage.devices):
        try:
            calls = [STAGES[name].make(weights[n % len(weights)], batch) for n, batch in enumerate(batches)]
            sample = interleave({name: Subject.in_turn(calls, lambda call: call())}, clock, settings.seconds)[name]
        except Exception as error:
            found.append((name, {"reason": explain(error)}))
            continue
        found.append((name, sample.columns()))
    return found


def _finish(row: Row, done: list[Work], roof: machine.Roof) -> Row:
    blank = dict.fromkeys(("p50_ms", "p20_ms", "p80_ms", "tflops", "gbs", "floor_ms", "percent_of_floor", "reason"))
    where = {key: row[key] for key in ("model", "dtype", "tokens", "stage")}
    row = {**where, **blank, "reps": 0, **row, "about": STAGES[row["stage"]].about}
    if done and row["p50_ms"]:
        row["floor_ms"] = 1000 * mean([one.floor(roof.tflops * 1e12, roof.gbs * 1e9) for one in done])
        row["tflops"] = mean([one.flops for one in done]) / row["p50_ms"] / 1e9
        row["gbs"] = mean([one.nbytes for one in done]) / row["p50_ms"] / 1e6
        row["percent_of_floor"] = 100 * row["floor_ms"] / row["p50_ms"]
    return row
