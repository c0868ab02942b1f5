"""The line on a terminal while a training runs: step, loss, speed, how evenly each MoE layer is loaded, time left."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from moectl.training.metrics import Metrics

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], *, full: float = 1.0, width: int = 24) -> str:
    """One bar per value, or per group of neighbours where there are more than `width`; `full` and more fill it."""
    per = -(-len(values) // width) if values else 1
    means = [sum(values[at : at + per]) / len(values[at : at + per]) for at in range(0, len(values), per)]
    return "".join(BARS[min(len(BARS) - 1, int(max(0.0, mean) / full * len(BARS)))] for mean in means)


def summary(metrics: Metrics) -> str:
    """A step in a few words; the bars are the layers' coefficients of variation, empty when balanced."""
    words = [f"loss {metrics.loss:.4f}", f"{metrics.tokens_per_second:,.0f} tokens/s"]
    if metrics.aux is not None:
        words += [f"aux {metrics.aux:.3f}", f"load {sparkline(metrics.load_cv)}"]
    return "  ".join(words)


@contextmanager
def live(title: str, steps: int, done: int, *, quiet: bool = False) -> Iterator[Callable[[Metrics], None]]:
    """Show the line on stderr while the block runs; yields what is told of every step.

    Nothing is drawn when stderr is not a terminal, TERM is dumb, or `quiet`.
    """
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _metrics: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=steps, completed=done, said="")
        yield lambda metrics: bar.update(task, completed=metrics.step, said=summary(metrics))
