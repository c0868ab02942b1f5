"""Where steps are shown beside the metrics file, on request: TensorBoard, Weights & Biases. Neither has to be there."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from moectl.errors import MachineError, UsageError
from moectl.text import reason
from moectl.training.metrics import Metrics, MetricsFile


class Tracker(Protocol):
    """What is told of every step."""

    def add(self, metrics: Metrics) -> None:
        """Show a step."""

    def close(self) -> None:
        """End, with everything shown."""


class TensorBoard:
    """Event files in train/tensorboard of the output, also the partial one; a resumed run hides what comes again."""

    def __init__(self, root: Path, about: dict[str, Any], fingerprint: str, step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(root / "train" / "tensorboard"), purge_step=step + 1)

    def add(self, metrics: Metrics) -> None:
        """Show a step."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()  # it would keep two minutes of them to itself, which a killed run has lost

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run in the project that WANDB_PROJECT names, or moectl; a training that is resumed goes on in the same run."""

    def __init__(self, root: Path, about: dict[str, Any], fingerprint: str, step: int) -> None:
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", "moectl"),
            name=root.name.removesuffix(".partial"),
            id=hashlib.sha256(f"{fingerprint} {root}".encode()).hexdigest()[:16],
            resume="allow",
            config=about,
        )

    def add(self, metrics: Metrics) -> None:
        """Show a step."""
        self._run.log(scalars(metrics), step=metrics.step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, dict[str, Any], str, int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
}
"""What `--log-to` may say -> the package it needs, and what it is told by."""


def check_trackers(names: Sequence[str]) -> None:
    """See that all of them can be told, without importing any.

    Raises:
        MachineError: a package is not installed.
        UsageError: a name is not known.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--log-to {name!r} is not known.", "", f"Choose from {', '.join(TRACKERS)}.")
        package = TRACKERS[name][0]
        if find_spec(package) is None:
            raise MachineError(
                f"--log-to {name} needs the package {package}, which is not installed.",
                "The steps would be shown nowhere but in train/metrics.jsonl, which is written anyway.",
                "pip install 'moectl[log]', or leave --log-to out.",
            )


@contextmanager
def recording(
    file: Path, names: Sequence[str], root: Path, about: dict[str, Any], fingerprint: str, step: int
) -> Iterator[list[Tracker]]:
    """Yield what is to be told of every step after `step`: the metrics file and the trackers, closed in the end.

    Args:
        about: the recipe, for those that show it.
        fingerprint: by which a tracker knows a resumed run.

    Raises:
        MachineError: a tracker cannot begin.
    """
    with ExitStack() as stack:
        told: list[Tracker] = [MetricsFile(file, step)]
        stack.callback(told[0].close)
        for name in names:
            try:
                told.append(TRACKERS[name][1](root, about, fingerprint, step))
            except Exception as error:  # whatever a tracker raises: no key, no network, another version
                raise MachineError(
                    f"--log-to {name} could not begin: {reason(error)}", "", "Or leave it out."
                ) from error
            stack.callback(told[-1].close)
        yield told


def scalars(metrics: Metrics) -> dict[str, float]:
    """A step's numbers by name; those of MoE layer L as load_cv/L and max_vio/L."""
    found: dict[str, float] = {}
    for name, value in asdict(metrics).items():
        if isinstance(value, tuple):
            found |= {f"{name}/{layer}": each for layer, each in enumerate(value)}
        elif value is not None and name != "step":
            found[name] = value
    return found
