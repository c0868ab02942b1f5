"""How much each expert matters, as Statistics: measured once, then any number of experts can be pruned by them.

Tensors are `layers.{layer}.{name}`, float64 [E]. Legend: E experts of a layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moectl.checkpoint.kept import kept_file
from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.layout import Layout
from moectl.errors import InputError, UsageError
from moectl.text import escape

TOKENS, NORMS, GATED, WEIGHTS = "tokens", "norms", "gated_norms", "aimer"
"""Tokens routed to an expert; sums over them of its output's norm, and of gate times that; what `aimer` looks at."""
_NAME = re.compile(r"layers\.(\d+)\.([\w.]+)")

Measured = Mapping[int, Mapping[str, np.ndarray]]
"""By layer and name, [E]."""


@dataclass(frozen=True)
class Scores:
    """What was measured of each expert, and on what.

    Attributes:
        layers: the statistics.
        about: model, data, tokens and how they were seen; empty where no data was needed.
        sha256: of the file they are in.
    """

    layers: Measured
    about: Mapping[str, Any]
    sha256: str

    def saliency(self, method: str, layer: int, kept: int) -> np.ndarray:
        """How much each expert of a layer matters by a method, [E]; the least go first."""
        of_layer = self.layers[layer]
        if method == "reap":
            return of_layer[GATED] / np.maximum(of_layer[TOKENS], 1)
        return of_layer[needed(method, kept)[-1]]


def needed(method: str, kept: int) -> tuple[str, ...]:
    """The statistics a method looks at; those of `naee` are for one number of experts, and are about subsets."""
    return {
        "reap": (TOKENS, GATED),
        "frequency": (TOKENS,),
        "ean": (TOKENS, NORMS),
        "aimer": (WEIGHTS,),
        "naee": (naee_name(kept),),
    }[method]


def naee_name(kept: int) -> str:
    """The statistic that is 1 for the experts of the best subset of so many, and 0 for the others."""
    return f"best_{kept}"


def write_scores(path: Path, layout: Layout, measured: Measured, about: Mapping[str, Any]) -> None:
    """Put statistics and what they are about into a safetensors file; one that is there stays."""
    arrays = {
        f"layers.{layer}.{name}": np.asarray(value, "<f8")
        for layer, values in measured.items()
        for name, value in values.items()
    }
    metadata = {"routers": layout.identity, "about": json.dumps({"model": layout.source.name, **about})}
    kept_file(path, lambda: arrays, metadata)


def read_scores(path: Path, layout: Layout, method: str, kept: int) -> Scores:
    """Statistics for a model and a method from a file.

    Raises:
        InputError: it is no file of statistics, is about another model, or lacks what the method needs.
    """
    file = Checkpoint.of_file(path)
    metadata = _metadata(path)
    if metadata.get("format") != "moectl.statistics/1" or "routers" not in metadata:
        raise _bad(path, "is no file of scores", "Nothing says which model they are of.")
    about = json.loads(metadata["about"])
    if metadata["routers"] != layout.identity:
        raise _bad(
            path,
            f"holds scores of another model ({escape(str(about.get('model')))}), not of {escape(layout.source.name)}",
            "Their routers differ, so their experts are others.",
        )
    layers: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in layout.layers}
    for name in file.tensors:
        found = _NAME.fullmatch(name)
        if found and int(found[1]) in layers:
            layers[int(found[1])][found[2]] = _checked(path, name, file.read(name), layout.experts)
    for layer, values in layers.items():
        lacking = [name for name in needed(method, kept) if name not in values]
        if lacking:
            what = f"has no tensor 'layers.{layer}.{lacking[0]}', which {method} looks at"
            raise _bad(path, what, f"It holds {', '.join(sorted(values)) or 'nothing'} of that layer.")
    return Scores(layers, about, str(file.commit))


def chosen(saliency_E: np.ndarray, kept: int, groups: int) -> tuple[int, ...]:
    """The `kept` experts that matter most, as many of each group of neighbours, in their order; of equals the first."""
    size = len(saliency_E) // groups
    order = np.argsort(-saliency_E, kind="stable")
    best = [[int(expert) for expert in order if expert // size == group][: kept // groups] for group in range(groups)]
    return tuple(sorted(expert for group in best for expert in group))


def choose(layout: Layout, scores: Scores, method: str, kept: int) -> dict[int, tuple[int, ...]]:
    """The experts that stay, by layer.

    Raises:
        InputError: fewer experts of a layer were given a token than are to be kept, so the rest cannot be told apart.
    """
    for layer in layout.layers:
        if TOKENS not in needed(method, kept):
            break
        group = (scores.layers[layer][TOKENS] > 0).reshape(layout.groups, -1).sum(axis=1)
        seen = int(np.minimum(group, kept // layout.groups).sum())
        if seen < kept:
            router = next(name for name in layout.routers if layout.sliced[name][0] == layer)
            raise InputError(
                f"{escape(str(layout.source.tensors[router].file))}: {escape(router)} sent no token to all but "
                f"{seen} of the {kept} experts of layer {layer} that are to be kept.",
                "Which of the others matter is not known.",
                "Give more --data or --samples, keep fewer experts, or use --method aimer.",
            )
    return {layer: chosen(scores.saliency(method, layer, kept), kept, layout.groups) for layer in layout.layers}


def never_routed(scores: Scores) -> int:
    """How many of all experts no token was sent to; 0 where nobody counted."""
    return sum(int((values[TOKENS] == 0).sum()) for values in scores.layers.values() if TOKENS in values)


def require_same_about(scores: Scores, path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse options that scores from a file contradict.

    Raises:
        UsageError: they were measured on other data, or on more or fewer tokens.
    """
    for option, value in asked.items():
        there = scores.about.get(option)
        if value is not None and value != there:
            raise UsageError(
                f"{escape(str(path))} holds scores measured with {option} = {there}, not {value}.",
                "A file of scores is used as it is, and the model is not run again.",
                "Leave the option out, or name another file.",
            )


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata() or {}


def _checked(path: Path, name: str, value_E: np.ndarray, experts: int) -> np.ndarray:
    if value_E.shape != (experts,) or not np.isfinite(value_E).all():
        raise _bad(path, f"has tensor {name!r} that is not {experts} finite numbers", "There is one for each expert.")
    return value_E


def _bad(path: Path, what: str, why: str) -> InputError:
    return InputError(f"{escape(str(path))} {what}.", why, "Name another file; one that is not there is made.")
