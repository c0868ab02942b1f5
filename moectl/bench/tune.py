"""Find launch choices for this device by trying them: `moectl bench layer --tune`.

One line of a tuning table after the other, by coordinate descent: the size of the row blocks first, then each kernel's
own choices, keeping what makes the whole pass faster by more than noise. Trials use a scratch table; only the result is
saved.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from moe_kernels import target, tuning
from moectl.bench import device as machine
from moectl.bench import routing
from moectl.bench.inputs import make_batches, make_weights
from moectl.bench.peers import ours
from moectl.bench.run import BACKWARD, Settings, subject_of
from moectl.bench.shapes import Shape
from moectl.errors import MachineError
from moectl.report.html import write

Measure = Callable[[tuning.Line], float]
"""Milliseconds of a pass with a line in use; infinite where it cannot be launched."""

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


def tune(settings: Settings, seconds: float, on_line: Callable[[str], None] = lambda _title: None) -> Path:
    """Tune the lines that the shapes and tokens of `settings` use, about `seconds` each, and save the user's table.

    Raises:
        MachineError: there is no CUDA device.
    """
    device = machine.pick(settings.device)
    if device.type != "cuda":
        raise MachineError("--tune needs a CUDA device.", "Only Triton kernels have launch choices.", "Leave it out.")
    probe = torch.empty(0, device=device)
    where = target.of(probe)
    lines = list(current(where))
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for tokens in settings.tokens:
                place = find(lines, tokens * shape.top_k, shape.num_experts)
                on_line(f"{shape.name} {dtype} {tokens} tokens: up to {lines[place].rows:g} rows per expert")
                measure = _measure(shape, dtype, tokens, settings, where.name, lines, place)
                what = set(settings.what) & set(BACKWARD)
                kernels = tuning.KERNELS if what else FORWARD
                lines[place] = search(lines[place], kernels, measure, seconds)
    return tuning.save(where.name, tuple(lines))


def current(where: target.Target) -> tuple[tuning.Line, ...]:
    """The table in use for a device: the user's own or the packaged one."""
    own = tuning.user_table(where.name)
    packaged = files("moe_kernels") / "tables" / f"{where.arch}.json"
    return tuning.parse(json.loads(own.read_text() if own.is_file() else packaged.read_text()))


def find(lines: list[tuning.Line], rows: int, experts: int) -> int:
    """Which line is for `rows` routed rows over `experts` experts."""
    return next((i for i, line in enumerate(lines) if rows <= line.rows * experts), len(lines) - 1)


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


def _measure(
    shape: Shape, dtype: str, tokens: int, settings: Settings, name: str, lines: list[tuning.Line], place: int
) -> Measure:
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


def export_vllm(shape: Shape, lines: list[tuning.Line], device_name: str, folder: Path) -> Path:
    """Write vLLM's `E=..,N=..,device_name=...json`: for each of its token counts the choices of our up-projection.

    vLLM has one entry for both products, so this is a start for its own tuner rather than its optimum.
    """
    entries: dict[str, Any] = {}
    for tokens in VLLM_TOKENS:
        up = lines[find(lines, tokens * shape.top_k, shape.num_experts)]["up"]
        entries[str(tokens)] = {
            "BLOCK_SIZE_M": up.block_m,
            "BLOCK_SIZE_N": up.block_n,
            "BLOCK_SIZE_K": up.block_k,
            "GROUP_SIZE_M": up.group_m,
            "num_warps": up.warps,
            "num_stages": up.stages,
        }
    name = f"E={shape.num_experts},N={shape.intermediate_size},device_name={device_name.replace(' ', '_')}.json"
    write(folder / name, json.dumps(entries, indent=4) + "\n")
    return folder / name
