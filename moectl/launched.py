"""Which of the processes that torchrun started this one is, by what it puts into their environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from moectl.errors import UsageError
from moectl.text import escape


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which process of how many this is, RANK from 0 of WORLD_SIZE; (0, 1) without a launcher.

    Raises:
        UsageError: they are no numbers, or impossible ones.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return 0, 1
    rank, size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= size:
        raise _unclear(f"RANK {rank} of WORLD_SIZE {size} is impossible: ranks are numbered from 0.")
    return rank, size


def local_rank() -> int:
    """Which process of this machine it is, and so the number of its GPU; 0 without a launcher.

    Raises:
        UsageError: LOCAL_RANK is no number.
    """
    return _number(os.environ, "LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environment[name]):
        raise _unclear(f"{name} is {escape(environment[name])!r}, not a number.")
    return int(environment[name])


def _unclear(what: str) -> UsageError:
    return UsageError(
        what,
        "By such variables a process knows which of how many it is.",
        "Start the processes with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run one alone.",
    )
