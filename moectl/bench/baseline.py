"""Compare two results of the same benchmark: the gate that keeps a change from making things slower."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.errors import CheckFailed, InputError, UsageError
from moectl.text import few, shown

SCHEMA = "moectl.bench/1"
SHARED = ("--clock", "--prompt", "--batch", "--new-tokens")


@dataclass(frozen=True)
class Comparison:
    """Rows by name with the time now over the time then; names that only one side has; rows that fail now."""

    ratios: dict[str, float]
    gone: list[str]
    new: list[str]
    broken: list[str]

    def require(self, limit: float) -> None:
        """Raises CheckFailed, naming them, if rows are slower than `limit` (0.05 is five percent) or fail now."""
        slower = {name: ratio for name, ratio in self.ratios.items() if ratio > 1 + limit}
        named = [f"{name} takes {ratio:.3g} times as long" for name, ratio in slower.items()]
        named += [f"{name} was measured and fails now" for name in self.broken]
        if named:
            raise CheckFailed(
                f"Slower than the baseline by more than {100 * limit:g} %: {few(named)}.",
                "Medians of the two runs are compared.",
                "Measure again with a longer --time if the machine was busy; else find the change.",
            )


def read(path: Path) -> dict[str, Any]:
    """A result file of `moectl bench`.

    Raises:
        InputError: it cannot be read or is something else.
    """
    fix = "Give a file that `moectl bench ... --output FILE` has written."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(str(path))} cannot be read: {shown(str(error))}.", "", fix) from error
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or document.get("schema") != SCHEMA or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{shown(str(path))} is not a result of {SCHEMA}.", "", fix)
    return document


def compare(now: dict[str, Any], then: dict[str, Any]) -> Comparison:
    """Match the rows of two documents by what was measured.

    Raises:
        UsageError: they are of different devices or kinds of benchmark, or differ in an option that all rows share.
    """
    for what, ours, theirs in (
        ("kind", now.get("kind"), then.get("kind")),
        ("device", now["device"].get("name"), then.get("device", {}).get("name")),
        ("--threads", now["device"].get("threads"), then.get("device", {}).get("threads")),
        *((option, _setting(now, option), _setting(then, option)) for option in SHARED),
    ):
        if ours != theirs:
            raise UsageError(
                f"The baseline is of another {what}: {shown(str(theirs))}, this is {shown(str(ours))}.",
                "The two cannot be compared.",
                "Make a baseline here with --output.",
            )
    old, new = _times(then), _times(now)
    measured = {name for name, time in old.items() if time}
    both = [name for name in new if name in measured and new[name]]
    return Comparison(
        {name: float(new[name] or 0) / float(old[name] or 1) for name in both},
        gone=[name for name in old if name in measured and name not in new],
        new=[name for name, time in new.items() if time and name not in measured],
        broken=[name for name in new if name in measured and not new[name]],
    )


def parse_limit(text: str) -> float:
    """0.05 from `5%` or `0.05`.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not match:
        raise UsageError(f"--fail-slower {shown(text)} is not a share.", "", "Write 5% or 0.05.")
    return float(match[1]) / (100 if match[2] else 1)


def row_name(document: dict[str, Any], row: dict[str, Any]) -> str:
    """What a row measures, in words that are the same in every run."""
    settings = document.get("settings", {})
    words = [row.get(key) for key in ("backend", "stage", "model", "dtype", "what")]
    words += [f"T={row['tokens']}"] if row.get("tokens") else []
    words += [settings.get("routing") if settings.get("routing") != "uniform" else None]
    words += [flag for flag in ("graph", "compile") if settings.get(flag)]
    return shown(" ".join(str(word) for word in words if word))


def _setting(document: dict[str, Any], option: str) -> Any:
    return document.get("settings", {}).get(option.removeprefix("--").replace("-", "_"))


def _times(document: dict[str, Any]) -> dict[str, float | None]:
    """Median by name; None for a row with a reason instead of a time."""
    times = {}
    for row in document["rows"]:
        time = row.get("p50_ms")
        times[row_name(document, row)] = float(time) if isinstance(time, int | float) and time > 0 else None
    return times
