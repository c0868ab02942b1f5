"""The formats of routing traces that are read, and `read`, which recognises them by content.

A format is a module with `recognises(path)` and `read(path, facts)`, and one line below.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.errors import InputError, UsageError
from moectl.text import escape

if TYPE_CHECKING:
    from moectl.traces.store import Recording


@dataclass(frozen=True, slots=True)
class Facts:
    """What a format may not say of the model, and the user can.

    Attributes:
        num_experts: routed experts of a layer; without it one more than the highest number seen, and a warning.
        top_k: experts per token.
        layers: how many layers lie in a flat array: all of the model's, dense ones too.
    """

    num_experts: int | None = None
    top_k: int | None = None
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One format: what `--format` calls it, and what it is. Its module has the same name."""

    name: str
    what: str

    @property
    def module(self) -> Any:
        """`recognises(path) -> bool` and `read(path, facts) -> dict[str, Recording]`."""
        return import_module(f"moectl.routing.ingest.{self.name}")


FORMATS = {
    format.name: format
    for format in (
        Format("own", "a directory that `moectl analyze-routing --trace` wrote"),
        Format("megatron", "router_trace_rank*.jsonl of Megatron-LM"),
        Format("olmoe", "jsonl of OLMoE's run_moe_analysis.py"),
        Format("routed_experts", "responses or arrays of vLLM and SGLang with routed_experts"),
        Format("sglang_recorder", ".pt of SGLang's expert distribution recorder (stat, per_token)"),
        Format("llama_cpp", "CSV of llama.cpp's moe-trace"),
    )
}


def read(path: Path, format: str | None = None, **facts: int | None) -> dict[str, Recording]:
    """The recordings in a file or directory, by stream (`decoder`, `encoder`, `mtp`).

    `trace.about` holds `format`, `source`, `warnings` (sentences) and `off`: why an analysis, named as its function in
    `moectl.traces`, can say nothing of this recording. The facts are those of `Facts`.

    Raises:
        InputError: there is nothing at the path, no format fits it, or the file is damaged: file and line are named.
        UsageError: there is no format of that name, or a fact is not positive.
    """
    for name, value in facts.items():
        if value is not None and value < 1:
            raise UsageError(f"The {name} of a trace is {value}.", "It is at least 1.", "Correct the number.")
    if not path.exists():
        raise InputError(
            f"{escape(str(path))} does not exist.", "There is no trace to read.", "Give a file or a directory."
        )
    if format is not None and format not in FORMATS:
        raise UsageError(f"There is no format {format!r}.", "", f"Choose one of {', '.join(FORMATS)}.")
    known = [FORMATS[format]] if format else [known for known in FORMATS.values() if known.module.recognises(path)]
    if not known:
        raise InputError(
            f"{escape(str(path))} is no routing trace of a known kind.",
            "Known are: " + "; ".join(f"{each.name} ({each.what})" for each in FORMATS.values()) + ".",
            "Give another file, or its kind with --format, and the error will say what does not fit.",
        )
    return dict(known[0].module.read(path, Facts(**facts)))
