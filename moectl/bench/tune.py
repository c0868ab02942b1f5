"""Find launch choices for this device by trying them: `moectl bench layer --tune`.

One line of a tuning table after the other, by coordinate descent: the size of the row blocks first, then each kernel's
own choices, keeping what makes the whole pass faster by more than noise. Cells that share a line are tuned together.
Trials use a scratch table; only the result is saved.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_kernels import target, tuning
from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.inputs import make_batches, make_weights
from moectl.bench.peers import ours
from moectl.bench.run import BACKWARD, subject_of
from moectl.bench.shapes import Shape
from moectl.bench.sweep import Settings
from moectl.errors import MachineError
from moectl.report.html import write

Cell = tuple[Shape, str, int]
"""Shape, dtype and tokens."""
Measure = Callable[[tuning.Line], float]
"""What a pass takes with a line in use; infinite where it cannot be launched."""

BLOCK_M = (16, 32, 64, 128)
CHOICES: dict[str, tuple[int, ...]] = {
    "block_n": (32, 64, 128, 256),
    "block_k": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "group_m": (1, 8, 16),
}
OWN_BLOCK_M = {"block_m": (32, 64, 128)}
FORWARD = ("up", "down")
WORTH = 0.99
VLLM_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)


def tune(
    settings: Settings,
    seconds: float,
    on_line: Callable[[str], None] = lambda _title: None,
    on_skip: Callable[[str], None] = lambda _reason: None,
) -> Path | None:
    """Tune the lines that the cells of `settings` use, about `seconds` for each cell, and save the user's table.

    `on_skip` is told about cells that no line serves; without any other there is no table.

    Raises:
        MachineError: there is no CUDA device.
    """
    device = machine.pick(settings.device)
    if device.type != "cuda":
        raise MachineError("--tune needs a CUDA device.", "Only Triton kernels have launch choices.", "Leave it out.")
    probe = torch.empty(0, device=device)
    where = target.of(probe)
    lines = list(tuning.table(where))
    kernels = tuning.KERNELS if set(settings.what) & set(BACKWARD) else FORWARD
    cells = by_line(settings, where, on_skip)
    for place, sharing in cells.items():
        names = ", ".join(f"{shape.name} {dtype} {tokens} tokens" for shape, dtype, tokens in sharing)
        on_line(f"{names}: up to {lines[place].rows:g} rows per expert")
        measure = together([_measure(cell, settings, where.name, lines, place) for cell in sharing])
        lines[place] = search(lines[place], kernels, measure, seconds * len(sharing))
    return tuning.save(where.name, tuple(lines)) if cells else None


def by_line(settings: Settings, where: target.Target, on_skip: Callable[[str], None]) -> dict[int, list[Cell]]:
    """Which cells use which line, by its place in the table; `on_skip` is told about those that use none."""
    from moe_kernels.gpu import decode

    backward = bool(set(settings.what) & set(BACKWARD))
    found: dict[int, list[Cell]] = {}
    for dtype in settings.dtypes:
        if machine.DTYPES[dtype].itemsize != 2:
            on_skip(f"{dtype} is not tuned: it takes the lines of the types of two bytes.")
            continue
        for shape in settings.shapes:
            for tokens in settings.tokens:
                if not backward and decode.fits(tokens, shape.top_k, shape.num_experts):
                    on_skip(f"{shape.name} {dtype} {tokens} tokens is not tuned: it takes the small-batch kernels.")
                    continue
                line = tuning.choose(where, tokens * shape.top_k, shape.num_experts)
                found.setdefault(tuning.table(where).index(line), []).append((shape, dtype, tokens))
    return found


def together(cells: list[Measure]) -> Measure:
    """The sum over cells, each as a share of its first time, so that a long one does not outweigh a short one."""
    first: dict[int, float] = {}

    def measure(line: tuning.Line) -> float:
        taken = [cell(line) for cell in cells]
        for number, time_ms in enumerate(taken):
            if math.isfinite(time_ms):
                first.setdefault(number, time_ms)
        return sum(time_ms / first.get(number, 1.0) for number, time_ms in enumerate(taken))

    return measure


def search(line: tuning.Line, kernels: tuple[str, ...], measure: Measure, seconds: float) -> tuning.Line:
    """Coordinate descent from `line` until nothing helps or the time is over; never returns anything slower."""
    deadline = time.monotonic() + seconds
    best, fastest, improved = line, measure(line), True
    while improved and time.monotonic() < deadline:
        improved = False
        for candidate in _neighbours(lambda: best, kernels):  # noqa: B023
            if time.monotonic() > deadline:
                break
            taken = measure(candidate)
            if taken < WORTH * fastest:
                best, fastest, improved = candidate, taken, True
    return best


def _neighbours(best: Callable[[], tuning.Line], kernels: tuple[str, ...]) -> Iterator[tuning.Line]:
    """Lines that differ in one choice from the best so far, which may change on the way."""
    for block_m in BLOCK_M:
        if block_m != best().block_m:
            yield with_block_m(best(), block_m)
    for kernel in kernels:
        for name, values in (CHOICES | OWN_BLOCK_M if kernel == "dw" else CHOICES).items():
            for value in values:
                launch = best()[kernel]
                if value != getattr(launch, name):
                    changed = {**best().launches, kernel: replace(launch, **{name: value})}
                    yield replace(best(), launches=changed)


def with_block_m(line: tuning.Line, block_m: int) -> tuning.Line:
    """The line with other row blocks; "dw" has its own."""
    launches = {
        name: launch if name == "dw" else replace(launch, block_m=block_m) for name, launch in line.launches.items()
    }
    return replace(line, block_m=block_m, launches=launches)


def _measure(cell: Cell, settings: Settings, name: str, lines: list[tuning.Line], place: int) -> Measure:
    shape, dtype, tokens = cell
    device = machine.pick("cuda")
    what = "train" if set(settings.what) & set(BACKWARD) else "fwd"
    train = what == "train"
    weights = make_weights(shape, machine.DTYPES[dtype], device, settings.seed, train)
    draw = routing.make(settings.routing, shape)
    batches = make_batches(shape, tokens, machine.DTYPES[dtype], device, draw, settings.seed, train)
    subject = subject_of([ours.build(one) for one in weights], batches, what)
    clock = machine.clock_of(device)

    def measure(line: tuning.Line) -> float:
        with _scratch(), torch.set_grad_enabled(train):
            tuning.save(name, (*lines[:place], line, *lines[place + 1 :]))
            try:
                clock.burst(subject, 0, 2)
                return sorted(clock.burst(subject, 2, 7).times)[3]
            except Exception:  # Triton has no one exception for what does not fit or does not compile
                return float("inf")

    return measure


@contextmanager
def _scratch() -> Iterator[None]:
    """Inside, the user's table is one in a temporary folder; afterwards, what it was."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before
            tuning.table.cache_clear()


def export_vllm(shape: Shape, where: target.Target, folder: Path) -> Path:
    """Write vLLM's `E=..,N=..,device_name=...json`: for each of its token counts the choices of our up-projection.

    vLLM has one entry for both products, so this is a start for its own tuner rather than its optimum.
    """
    entries: dict[str, Any] = {}
    for tokens in VLLM_TOKENS:
        up = tuning.choose(where, tokens * shape.top_k, shape.num_experts)["up"]
        entries[str(tokens)] = {
            "BLOCK_SIZE_M": up.block_m,
            "BLOCK_SIZE_N": up.block_n,
            "BLOCK_SIZE_K": up.block_k,
            "GROUP_SIZE_M": up.group_m,
            "num_warps": up.warps,
            "num_stages": up.stages,
        }
    name = f"E={shape.num_experts},N={shape.intermediate_size},device_name={where.name.replace(' ', '_')}.json"
    write(folder / name, json.dumps(entries, indent=4) + "\n")
    return folder / name
