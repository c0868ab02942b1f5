"""What a benchmark is told, and the loop that all have: every cell in turn, between two measurements of the roof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from moectl.bench import device as machine
from moectl.bench.shapes import Shape

T = TypeVar("T")
OnCell = Callable[[str], None]
OnPart = Callable[[dict[str, Any]], None]
Roofs = dict[str, machine.Roof]


@dataclass(frozen=True)
class Settings:
    """What to measure and how; the options of `moectl bench layer`."""

    shapes: list[Shape]
    tokens: list[int]
    what: list[str]
    dtypes: list[str]
    backends: list[str]
    routing: str = "uniform"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    graph: bool = False
    compile: bool = False
    check: bool = True
    clock: str = "wall"
    seconds: float = 0.5


def sweep(
    settings: Settings,
    device: torch.device,
    kind: str,
    said: dict[str, Any],
    cells: Iterable[list[T]],
    end: Callable[[list[T], Roofs], dict[str, Any]],
    on_part: OnPart | None,
    roofs: bool = True,
) -> dict[str, Any]:
    """The document of a benchmark.

    Args:
        kind, said: its kind, and the settings that it tells.
        cells: what each leaves behind, measured as it is asked for.
        end: the end of the document, of all that and of the roof of each dtype.
        on_part: is given the document so far, which says that it is partial, after each cell.
        roofs: whether roofs are measured.
    """
    rows: list[T] = []

    def document(after: dict[str, tuple[float, float]]) -> dict[str, Any]:
        reached = {name: machine.Roof.of(name, before[name], after[name]) for name in before}
        shapes = [asdict(shape) for shape in settings.shapes]
        start = {"kind": kind, "device": about, "settings": said, "shapes": shapes}
        told = {"roofs": [roof.to_json() for roof in reached.values()]} if roofs else {}
        return start | told | end(list(rows), reached)

    def measured() -> dict[str, tuple[float, float]]:
        clock = machine.clock_of(device, settings.clock)
        names = settings.dtypes if roofs else []
        return {name: machine.measure_roof(machine.DTYPES[name], device, clock) for name in names}

    with threads(settings.threads):
        about, before = machine.describe(device), measured()
        for found in cells:
            rows += found
            if on_part is not None:
                on_part(document(before) | {"partial": True})
        return document(measured())


def cells_of(
    settings: Settings, on_cell: OnCell, prepare: Callable[[Shape, str], Callable[[int], list[T]]]
) -> Iterator[list[T]]:
    """What `prepare(shape, dtype)(tokens)` returns, for every shape, dtype and number of tokens."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            measure = prepare(shape, dtype)
            for tokens in settings.tokens:
                on_cell(f"{shape.name} {dtype} {tokens}")
                yield measure(tokens)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch uses `count` threads, or as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
