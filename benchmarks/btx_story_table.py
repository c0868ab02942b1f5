"""Gathers the cells of the Branch-Train-MiX grid: python benchmarks/btx_story_table.py FOLDER > results/btx_story.json

FOLDER holds a folder REGIME-SEED for every cell, as in `benchmarks/btx_story.sh FOLDER/short-0 0 150`. Prints, for each
regime, the mean held-out loss over the three domains of every model: mean and range over the random seeds, each cell,
and what beats what in how many of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from machine import machine

REGIMES = {"short": 150, "long": 600}
SEEDS = (0, 1, 2)
BTX = "btx"
BEATEN = ("seed", "code", "prose", "arithmetic", "average", "ensemble (uniform)", "ensemble (posterior)")
COMPARED = [*((BTX, other) for other in BEATEN), ("upcycled", "dense"), (BTX, "upcycled"), (BTX, "upcycled-sequential")]


def main(folder: Path) -> None:
    """Print the document; a cell that has not ended is an error."""
    regimes = {}
    for regime, steps in REGIMES.items():
        cells = [_losses(folder / f"{regime}-{seed}" / "eval.json") for seed in SEEDS]
        regimes[regime] = {"seed_steps": steps, "seeds": list(SEEDS), "models": _models(cells), "wins": _wins(cells)}
    document = {
        "schema": "moectl.btx-story/2",
        "command": "benchmarks/btx_story.sh FOLDER/REGIME-SEED SEED SEED_STEPS, then btx_story_table.py FOLDER",
        "machine": machine(),
        "measure": "held-out loss in nats per byte, mean of code, prose and arithmetic",
        "regimes": regimes,
    }
    print(json.dumps(document, indent=2))


def _losses(file: Path) -> dict[str, dict[str, float]]:
    models = json.loads(file.read_text())["models"]
    return {
        model["name"]: {domain: measured["loss"] for domain, measured in model["domains"].items()} for model in models
    }


def _models(cells: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    means = {name: [cell[name]["mean"] for cell in cells] for name in cells[0]}
    return {
        name: {
            "mean": sum(values) / len(values),
            "range": [min(values), max(values)],
            "cells": [cell[name] for cell in cells],
        }
        for name, values in means.items()
    }


def _wins(cells: list[dict[str, dict[str, float]]]) -> dict[str, str]:
    return {
        f"{one} < {other}": f"{sum(cell[one]['mean'] < cell[other]['mean'] for cell in cells)} of {len(cells)}, by "
        + ", ".join(f"{cell[other]['mean'] - cell[one]['mean']:.3f}" for cell in cells)
        for one, other in COMPARED
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
