"""Measure ternary experts beside dense ones: `moectl bench kernels --what ternary`.

A pass is one projection of the routed rows, "up" or "down", or the whole "layer". There are some ways to do each, which
take turns on the same inputs. The floor is the same for all: the codewords, counts and levels of the experts that
got rows, read once at the speed of a large copy.

Legend: T tokens, K top-k, S = T*K routed rows, D hidden_size, F expert width, E experts, R rows and N columns of a
matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_kernels import expert_mlp
from moe_kernels.ternary import TernaryExperts, decode, matvec, ternary_mlp
from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.clock import Subject, interleave
from moectl.bench.coded import ZEROS, Stack, make_stacks
from moectl.bench.inputs import Batch, make_batches
from moectl.bench.rows import explain, mean
from moectl.bench.run import captured
from moectl.bench.shapes import Shape
from moectl.bench.sweep import OnCell, OnPart, Roofs, Settings, cells_of, sweep

CHECKED_ROWS = 64
MAX_BATCHES = 64
Row = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Product:
    """One projection of the routed rows x [S, N] in call `number`; `groups` has the places of each expert with any."""

    number: int
    stack: Stack
    x: Tensor
    expert: Tensor
    groups: list[tuple[int, Tensor]]

    @property
    def coded(self) -> TernaryExperts:
        """The copy whose turn it is."""
        return self.stack.copies[self.number % len(self.stack.copies)]


def _ternary(given: Product) -> Call:
    return lambda: matvec(given.coded, given.x, given.expert)


def _rows(given: Product) -> Call:
    return partial(_multiply, _inputs(given), [given.stack.dense[expert] for expert, _ in given.groups])


def _bmm(given: Product) -> Call:
    """As many neighbouring experts as got rows, others on each call, all with as many rows as the busiest has."""
    active, most = len(given.groups), max(len(places) for _, places in given.groups)
    first = given.number * active % (len(given.stack.dense) - active + 1)
    x = given.x.new_zeros(active, given.x.shape[1], most)
    for place, (_, rows) in enumerate(given.groups):
        x[place, :, : len(rows)] = given.x[rows].T
    return partial(torch.bmm, given.stack.dense[first : first + active], x)


def _int8(given: Product) -> Call:
    inputs = [x if x.ndim == 2 else x[None] for x in _inputs(given)]
    matrices = [(given.stack.whole[expert], given.stack.scale[expert]) for expert, _ in given.groups]

    def call() -> list[Tensor]:
        return [torch._weight_int8pack_mm(x, *matrix) for x, matrix in zip(inputs, matrices, strict=True)]

    return call


def _decoded(given: Product) -> Call:
    which = torch.tensor([expert for expert, _ in given.groups], device=given.x.device)
    inputs = _inputs(given)
    return lambda: _multiply(inputs, decode(given.coded, which))


def _inputs(given: Product) -> list[Tensor]:
    """The rows of x by expert: a vector where there is one."""
    return [given.x[places].squeeze(0) if len(places) == 1 else given.x[places] for _, places in given.groups]


def _multiply(inputs: list[Tensor], matrices: Any) -> list[Tensor]:
    return [torch.mv(w, x) if x.ndim == 1 else torch.mm(x, w.T) for x, w in zip(inputs, matrices, strict=True)]


@dataclass(frozen=True)
class Way:
    """A way to multiply: what it is, how its call is made, and the bytes that it moves of an expert's matrix."""

    about: str
    make: Callable[[Product], Call]
    nbytes: Callable[[Stack], float]


WAYS = {
    "mv": Way("torch.mv of each expert that got rows; mm where it got several", _rows, lambda s: s.dense[0].nbytes),
    "bmm": Way("torch.bmm of as many neighbouring experts", _bmm, lambda s: s.dense[0].nbytes),
    "int8": Way("torch's product with weights of 8 bits, each expert", _int8, lambda s: s.whole[0].nbytes),
    "decode, mv": Way("ternary decode, then mv", _decoded, lambda s: s.nbytes + 2 * s.dense[0].nbytes),
    "ternary": Way("moe_kernels.ternary.matvec", _ternary, lambda s: s.nbytes),
}
LAYERS = {"dense": "moe_kernels.expert_mlp on the same weights", "ternary": "moe_kernels.ternary.ternary_mlp"}
"""The first of each is what the others are compared with."""


COLUMNS = (
    *("p50_ms", "p20_ms", "p80_ms", "reps", "weights_per_s", "gbs", "floor_ms", "percent_of_floor", "speedup"),
    *("speedup_over", "max_error", "active_experts", "about", "reason"),
)


def measure(settings: Settings, on_cell: OnCell = lambda _title: None, on_part: OnPart | None = None) -> dict[str, Any]:
    """One row per shape, dtype, pass, number of tokens and way; a way that fails is a row with a reason.

    `on_part` as in `sweep`.

    Raises:
        MachineError: no such device, or the weights do not fit.
    """
    device = machine.pick(settings.device)

    def prepare(shape: Shape, name: str) -> Callable[[int], list[Row]]:
        on_cell(f"{shape.name} {name}: coding")
        up, down = make_stacks(shape, machine.DTYPES[name], device, settings.seed)

        def measured(tokens: int) -> list[Row]:
            batches = _batches(shape, tokens, name, device, settings, up.nbytes + down.nbytes)
            return [
                {"model": shape.name, "dtype": name, "what": what, "tokens": tokens, "stage": way, **row}
                for what, found in _measure_cell(up, down, batches, settings, device)
                for way, row in found
            ]

        return measured

    def end(rows: list[Row], roofs: Roofs) -> dict[str, Any]:
        return {"rows": [_finish(row, rows, roofs[row["dtype"]]) for row in rows]}

    said = {"what": "ternary", "zeros": ZEROS}
    said |= {"routing": settings.routing, "seed": settings.seed, "clock": settings.clock}
    found = cells_of(settings, on_cell, prepare)
    with torch.no_grad():
        return sweep(settings, device, "kernels", said, found, end, on_part)


def _batches(
    shape: Shape, tokens: int, dtype: str, device: torch.device, settings: Settings, nbytes: float
) -> list[Batch]:
    """So many that the codewords of one have left the cache when its turn comes again: an expert has `nbytes`."""
    draw = routing.make(settings.routing, shape)
    batches: list[Batch] = []
    while len(batches) < MAX_BATCHES and nbytes * sum(batch.active for batch in batches) < 2 * machine.cache_bytes(
        device
    ):
        seed = settings.seed + 1000 * len(batches) + tokens
        batches += make_batches(shape, tokens, machine.DTYPES[dtype], device, draw, seed, train=False)
    return batches


def _measure_cell(
    up: Stack, down: Stack, batches: list[Batch], settings: Settings, device: torch.device
) -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    """The rows of each pass: both projections, then the layer."""
    active = mean([batch.active for batch in batches])

    def told(found: dict[str, Row], abouts: dict[str, str], *stacks: Stack) -> list[tuple[str, Row]]:
        work = {
            "active_experts": active,
            "weights": active * sum(stack.weights for stack in stacks),
            "floor_bytes": active * sum(stack.nbytes for stack in stacks),
        }
        return [(name, {**row, **work, "about": abouts[name]}) for name, row in found.items()]

    generator = torch.Generator(device).manual_seed(settings.seed)
    for what, stack in (("up", up), ("down", down)):
        given = [_product(number, stack, batch, what, generator) for number, batch in enumerate(batches)]
        found = _timed(
            {name: [partial(way.make, one) for one in given] for name, way in WAYS.items()}, settings, device
        )
        for name, row in found.items():
            if "p50_ms" in row:
                row["gbs"] = active * WAYS[name].nbytes(stack) / row["p50_ms"] / 1e6
                row["max_error"] = _error(WAYS[name].make(given[0])(), given[0], name)
        yield what, told(found, {name: way.about for name, way in WAYS.items()}, stack)
    layers: dict[str, list[Callable[[], Call]]] = {"dense": [], "ternary": []}
    for number, batch in enumerate(batches):
        routed = (batch.index_TK, batch.weight_TK)
        coded_up, coded_down = (stack.copies[number % len(stack.copies)] for stack in (up, down))
        layers["dense"].append(partial(partial, expert_mlp, batch.x_TD, up.dense, down.dense, *routed))
        layers["ternary"].append(partial(partial, ternary_mlp, batch.x_TD, coded_up, coded_down, *routed))
    yield "layer", told(_timed(layers, settings, device), LAYERS, up, down)


def _timed(makers: dict[str, list[Callable[[], Call]]], settings: Settings, device: torch.device) -> dict[str, Row]:
    """The times of all ways in turn; on a GPU as CUDA graphs, for a loop over experts would be a time of launches."""
    found: dict[str, Row] = {name: {} for name in makers}
    subjects: dict[str, Subject] = {}
    for name, make in makers.items():
        try:
            subject = Subject.in_turn([one() for one in make], lambda call: call())
            subject.run(subject.prepare(0))
            subjects[name] = captured(subject, len(make)) if device.type == "cuda" else subject
        except Exception as error:
            found[name] = {"reason": explain(error)}

    def failed(name: str, error: Exception) -> None:
        found[name] = {"reason": explain(error)}

    samples = interleave(subjects, machine.clock_of(device, settings.clock), settings.seconds, failed)
    for name, sample in samples.items():
        found[name] |= sample.columns()
    return found


def _product(number: int, stack: Stack, batch: Batch, what: str, generator: torch.Generator) -> Product:
    tokens, top_k = batch.index_TK.shape
    expert = batch.index_TK.reshape(-1)
    x = batch.x_TD.repeat_interleave(top_k, 0)
    if what == "down":
        x = torch.randn(tokens * top_k, stack.dense.shape[2], generator=generator, device=x.device).to(x.dtype)
    groups = [(one, (expert == one).nonzero().squeeze(1)) for one in expert.unique().tolist()]
    return Product(number, stack, x, expert, groups)


def _error(result: Any, given: Product, way: str) -> float | None:
    """The largest error over the largest value, of some outputs of the first expert; bmm takes other experts."""
    if way == "bmm":
        return None
    expert, places = given.groups[0]
    found = result[places] if isinstance(result, Tensor) else result[0].view(len(places), -1)
    weights = given.stack.dense[expert, :CHECKED_ROWS].double()
    truth = given.x[places].double() @ weights.T
    return float((found[:, :CHECKED_ROWS].double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def _finish(row: Row, rows: list[Row], roof: machine.Roof) -> Row:
    """The columns of a row, all of them, with what follows from the roof and from the first way of its cell."""
    where = {key: row[key] for key in ("model", "dtype", "what", "tokens", "stage")}
    cell = [other for other in rows if all(other[key] == row[key] for key in ("model", "dtype", "what", "tokens"))]
    blank = dict.fromkeys(COLUMNS)
    found = where | blank | {key: row[key] for key in COLUMNS if key in row}
    if row.get("p50_ms"):
        found["floor_ms"] = row["floor_bytes"] / roof.gbs / 1e6
        found["percent_of_floor"] = 100 * found["floor_ms"] / row["p50_ms"]
        found["weights_per_s"] = row["weights"] / row["p50_ms"] * 1e3
        if cell[0].get("p50_ms"):
            found |= {"speedup": cell[0]["p50_ms"] / row["p50_ms"], "speedup_over": cell[0]["stage"]}
    return found
