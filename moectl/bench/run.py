"""Measure expert layers: for every shape, dtype, pass and number of tokens, all peers on the same inputs, in turn.

The result is a document: what it was measured on, the roof reached in the same run, and one row per peer and cell. A
peer that cannot be measured is a row with a reason. Nothing here prints.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.accuracy import TOKENS, TOLERANCE, Errors, check
from moectl.bench.clock import Subject, interleave
from moectl.bench.inputs import Batch, Weights, make_batches, make_weights
from moectl.bench.peers import Layer, Unavailable, build
from moectl.bench.rows import Row, compare, explain, finish
from moectl.bench.shapes import Shape
from moectl.bench.sweep import OnCell, OnPart, Roofs, Settings, sweep
from moectl.errors import MachineError, UsageError

BACKWARD = ("bwd", "train")


@dataclass
class _Measured:
    """What a cell leaves behind before the roof at the end of the run is known."""

    row: Row
    drawn: list[list[int]]
    shape: Shape


def measure(settings: Settings, on_cell: OnCell = lambda _title: None, on_part: OnPart | None = None) -> dict[str, Any]:
    """Measure everything and return the document.

    `on_cell` is told what comes next; `on_part` as in `sweep`.

    Raises:
        UsageError: options that exclude each other.
        MachineError: no such device, or the weights do not fit.
    """
    device = machine.pick(settings.device)
    if settings.graph and device.type != "cuda":
        raise MachineError("--graph needs a CUDA device.", "A CPU has no CUDA graphs.", "Leave --graph out.")
    if settings.graph and set(settings.what) & set(BACKWARD):
        raise UsageError("--graph goes with --what fwd and decode.", "", "Leave one of them out.")

    def end(measured: list[_Measured], roofs: Roofs) -> dict[str, Any]:
        rows = compare([finish(one.row, one.drawn, one.shape, roofs[one.row.dtype]) for one in measured])
        tolerance = {name: TOLERANCE[name] for name in settings.dtypes} | {"tokens": TOKENS}
        return {"tolerance": tolerance, "rows": [asdict(row) for row in rows]}

    said = {key: value for key, value in asdict(settings).items() if key not in ("shapes", "device")}
    cells = (found for cell in _cells(settings) for found in _measure_cell(cell, settings, device, on_cell))
    with _strictly_compiled(settings.compile):
        return sweep(settings, device, "layer", said, cells, end, on_part)


def _cells(settings: Settings) -> Iterator[tuple[Shape, str, bool, list[tuple[str, int]]]]:
    """Cells that share weights: shape, dtype, whether there is a backward pass, and the (pass, tokens) to measure."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for train in (False, True):
                whats = [what for what in settings.what if (what in BACKWARD) == train]
                if whats:
                    yield shape, dtype, train, [(what, tokens) for what in whats for tokens in settings.tokens]


def _measure_cell(
    cell: tuple[Shape, str, bool, list[tuple[str, int]]],
    settings: Settings,
    device: torch.device,
    on_cell: Callable[[str], None],
) -> Iterator[list[_Measured]]:
    """The rows of each pass and number of tokens."""
    shape, dtype_name, train, pairs = cell
    dtype = machine.DTYPES[dtype_name]
    draw = routing.make(settings.routing, shape)
    weights = make_weights(shape, dtype, device, settings.seed, train)
    layers, reasons = _build_all(settings.backends, weights, settings.compile)
    for what, tokens in pairs:
        on_cell(f"{shape.name} {dtype_name} {what} {tokens}")
        batches = make_batches(shape, tokens, dtype, device, draw, settings.seed + tokens, train)
        if settings.compile:
            torch._dynamo.reset()
        found = _measure_peers(layers, reasons, weights, batches, what, settings, device)
        drawn = [batch.counts for batch in batches]
        del batches
        start = Row(shape.name, dtype_name, what, tokens, "")
        yield [_Measured(replace(start, backend=name, **found[name]), drawn, shape) for name in settings.backends]
    del layers, weights
    _release(device)


def _build_all(
    backends: Iterable[str], weights: list[Weights], compiled: bool
) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """Every peer around every copy of the weights, or the reason why not."""
    layers, reasons = {}, {}
    for name in backends:
        try:
            built = [build(name, one) for one in weights]
        except Exception as error:
            reasons[name] = explain(error)
            continue
        layers[name] = [replace(one, call=torch.compile(one.call, dynamic=False)) if compiled else one for one in built]
    return layers, reasons


def _measure_peers(
    layers: dict[str, list[Layer]],
    reasons: dict[str, str],
    weights: list[Weights],
    batches: list[Batch],
    what: str,
    settings: Settings,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Fields of the rows of one cell, by peer: check first, then memory, then times, all peers in turn."""
    found: dict[str, dict[str, Any]] = {name: {"reason": reason} for name, reason in reasons.items()}
    subjects = {}
    graph = device.type == "cuda" and (settings.graph or what == "decode")
    for name, built in layers.items():
        try:
            fields: dict[str, Any] = {"block_m": built[0].block_m(batches[0].rows)}
            _refuse(built[0], len(batches[0].x_TD), what, device)
            if settings.check:
                fields |= _checked(check(built[0], weights[0], batches[0], what))
            subject = subject_of(built, batches, what)
            fields["peak_bytes"] = _peak(subject, device, what)
            subjects[name] = captured(subject, len(batches)) if graph else subject
            subjects[name].run(subjects[name].prepare(0))
            found[name] = fields
        except Exception as error:
            found[name] = {"reason": explain(error)}
            subjects.pop(name, None)
        _release(device)

    def failed(name: str, error: Exception) -> None:
        found[name] = {"reason": explain(error)}

    with nullcontext() if what in BACKWARD else torch.no_grad():
        samples = interleave(subjects, machine.clock_of(device, settings.clock), settings.seconds, failed)
    for name, sample in samples.items():
        found[name] |= sample.columns()
        if sample.other:
            found[name]["other_clock_ms"] = sorted(sample.other)[len(sample.other) // 2]
    return found


def subject_of(layers: list[Layer], batches: list[Batch], what: str) -> Subject:
    """The timed call: number n takes the n-th inputs and the n-th copy of the weights, round and round."""

    def inputs(n: int) -> tuple[Layer, Batch]:
        return layers[n % len(layers)], batches[n % len(batches)]

    def forward(state: tuple[Layer, Batch]) -> torch.Tensor:
        layer, batch = state
        return layer.call(batch.x_TD, batch.index_TK, batch.weight_TK)

    def backward(state: tuple[Layer, Batch, torch.Tensor]) -> Any:
        layer, batch, out_TD = state
        return torch.autograd.grad(out_TD, (batch.x_TD, batch.weight_TK, *layer.parameters), batch.dy_TD)

    if what == "bwd":
        return Subject(lambda n: (*inputs(n), forward(inputs(n))), backward)
    if what == "train":
        return Subject(inputs, lambda state: backward((*state, forward(state))))
    return Subject(inputs, forward)


def captured(subject: Subject, sets: int) -> Subject:
    """A CUDA graph of one call per set of inputs."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for n in range(sets):
                subject.run(subject.prepare(n))
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                for n in range(sets):
                    subject.run(subject.prepare(n))
        except Exception as error:
            raise Unavailable(f"it cannot be captured in a CUDA graph: {explain(error)}") from error
    return Subject(lambda _: None, lambda _: graph.replay(), calls=sets)


def _peak(subject: Subject, device: torch.device, what: str) -> int | None:
    """Bytes above the inputs at the worst moment of one call; on a CPU torch does not tell."""
    with nullcontext() if what in BACKWARD else torch.no_grad():
        subject.run(subject.prepare(0))
        if device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run(subject.prepare(1))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _refuse(layer: Layer, tokens: int, what: str, device: torch.device) -> None:
    """Do not even try what would take the memory of everybody else."""
    if what in BACKWARD and not layer.parameters:
        raise Unavailable("it has no backward pass")
    copied, free = layer.copied(tokens), machine.free_bytes(device)
    if copied > free / 8:
        raise Unavailable("a call would copy weights of more than an eighth of the free memory")


def _checked(errors: Errors) -> dict[str, Any]:
    return {
        "max_error": errors.relative,
        "rms_error": errors.rms,
        "check": "passed" if errors.good else "failed",
    }


def _strictly_compiled(compiled: bool) -> AbstractContextManager[object]:
    """Inside, what torch.compile gives up on is an error: a time of eager mode is not one of compiled code."""
    if not compiled:
        return nullcontext()
    import torch._dynamo.config as dynamo

    known = hasattr(dynamo, "fail_on_recompile_limit_hit")
    return dynamo.patch(fail_on_recompile_limit_hit=True) if known else nullcontext()


def _release(device: torch.device) -> None:
    """Give a GPU's memory back for the next peer; a CPU's goes back by itself, and collecting takes its time."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
