"""Measure the stages of our own layer one by one: `moectl bench kernels`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.clock import Subject, interleave
from moectl.bench.inputs import Batch, Weights, make_batches, make_weights
from moectl.bench.roofline import Work
from moectl.bench.rows import explain, mean
from moectl.bench.run import Settings, threads
from moectl.bench.stages import STAGES, Call

Row = dict[str, Any]


def measure(
    settings: Settings,
    on_cell: Callable[[str], None] = lambda _title: None,
    on_part: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """One row per shape, dtype, number of tokens and stage; a stage that fails is a row with a reason.

    `on_part` is given the document so far, which says that it is partial, after each number of tokens.

    Raises:
        MachineError: no such device, or the weights do not fit.
    """
    device = machine.pick(settings.device)
    rows: list[tuple[Row, list[Work]]] = []
    with threads(settings.threads):
        clock, about = machine.clock_of(device, settings.clock), machine.describe(device)
        before = {name: machine.measure_roof(machine.DTYPES[name], device, clock) for name in settings.dtypes}
        for shape in settings.shapes:
            for name in settings.dtypes:
                weights = make_weights(shape, machine.DTYPES[name], device, settings.seed, train=True)
                for tokens in settings.tokens:
                    on_cell(f"{shape.name} {name} {tokens}")
                    draw = routing.make(settings.routing, shape)
                    batches = make_batches(
                        shape, tokens, machine.DTYPES[name], device, draw, settings.seed + tokens, train=True
                    )
                    found = _measure_stages(weights, batches, settings, device)
                    start = {"model": shape.name, "dtype": name, "tokens": tokens}
                    for stage, fields in found:
                        work = STAGES[stage].work
                        done = [work(weights[0], batch) for batch in batches] if work else []
                        rows.append(({**start, "stage": stage, **fields}, done))
                    if on_part is not None:
                        on_part(_document(settings, about, before, before, rows) | {"partial": True})
        after = {name: machine.measure_roof(machine.DTYPES[name], device, clock) for name in settings.dtypes}
    return _document(settings, about, before, after, rows)


def _document(
    settings: Settings,
    about: dict[str, Any],
    before: dict[str, tuple[float, float]],
    after: dict[str, tuple[float, float]],
    rows: list[tuple[Row, list[Work]]],
) -> dict[str, Any]:
    roofs = {name: machine.Roof.of(name, before[name], after[name]) for name in settings.dtypes}
    return {
        "kind": "kernels",
        "device": about,
        "settings": {"routing": settings.routing, "seed": settings.seed, "clock": settings.clock},
        "shapes": [asdict(shape) for shape in settings.shapes],
        "roofs": [roof.to_json() for roof in roofs.values()],
        "rows": [_finish(row, done, roofs[row["dtype"]]) for row, done in rows],
    }


def _measure_stages(
    weights: list[Weights], batches: list[Batch], settings: Settings, device: torch.device
) -> list[tuple[str, Row]]:
    """One stage after the other: they are no rivals, and what each needs is made once and let go again."""
    clock = machine.clock_of(device, settings.clock)
    found: list[tuple[str, Row]] = []
    for name in (name for name, stage in STAGES.items() if device.type in stage.devices):
        try:
            calls = [STAGES[name].make(weights[n % len(weights)], batch) for n, batch in enumerate(batches)]
            sample = interleave({name: _in_turn(calls)}, clock, settings.seconds)[name]
        except Exception as error:
            found.append((name, {"reason": explain(error)}))
            continue
        p20, p50, p80 = sample.percentiles()
        found.append((name, {"p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "reps": len(sample.times)}))
    return found


def _in_turn(calls: list[Call]) -> Subject:
    return Subject(lambda n: calls[n % len(calls)], lambda call: call())


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
