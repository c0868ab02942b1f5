"""Which share of a plan's shards one process writes: `--worker K/N`, or from what a launcher says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moectl.checkpoint.plan import Shard
from moectl.errors import UsageError
from moectl.launched import rank_and_size
from moectl.text import escape


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker `number` (from 1) of `of` that write one plan, with no word between them."""

    number: int
    of: int

    def share(self, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        """Every N-th shard in the order of the plan."""
        return tuple(shards[self.number - 1 :: self.of])


def parse_worker(text: str, environment: Mapping[str, str]) -> Worker:
    """A worker from `K/N`, or from `auto`: RANK and WORLD_SIZE (torchrun), else the Slurm job array.

    Raises:
        UsageError: it is neither, K is not from 1 to N, or the variables are missing or make no sense.
    """
    if text != "auto":
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None:
            raise _unclear(f"--worker {escape(text)} is neither K/N nor auto.")
        return _checked(int(match[1]), int(match[2]), f"--worker {text}")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = rank_and_size(environment)
        return Worker(rank + 1, size)
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise _unclear(f"--worker auto found neither RANK and WORLD_SIZE nor {', '.join(missing)} in the environment.")
    task, first, count = (_number(environment, name) for name in names)
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    shown = f"Slurm task {task} of {count} from {first}"
    if step < 1 or (task - first) % step:
        raise _unclear(f"{shown} does not fit its step {step}.")
    return _checked((task - first) // step + 1, count, shown)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environment[name]):
        raise _unclear(f"{name} is {escape(environment[name])!r}, not a number.")
    return int(environment[name])


def _checked(number: int, of: int, shown: str) -> Worker:
    if not 1 <= number <= of:
        raise _unclear(f"{shown} is impossible: workers are numbered from 1 to N.")
    return Worker(number, of)


def _unclear(what: str) -> UsageError:
    return UsageError(
        what,
        "Every worker has to know its own share of the shards.",
        "Give --worker 1/4 to the first of four workers, or start them with torchrun or as a Slurm job array.",
    )
