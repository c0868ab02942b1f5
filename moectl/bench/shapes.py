"""Which expert layer is measured: shapes of published models as data, of any config.json, or written out.

A shape is all that is taken from a model: every layer here is d -> 2f -> SwiGLU -> f -> d without biases, so that all
peers compute the same function. Shared experts, routers and attention are not part of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.errors import InputError, MachineError, UsageError
from moectl.text import escape, shown


@dataclass(frozen=True)
class Shape:
    """One expert layer.

    Attributes:
        hidden_size: D, width of a token.
        intermediate_size: F, width of an expert.
        num_experts: E.
        top_k: K, experts per token.
        name: what it is called in tables.
        source: the config it was taken from.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    name: str = ""
    source: str = ""

    @property
    def weights(self) -> int:
        """Parameters of all experts: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size * self.num_experts

    def split(self, tp_size: int) -> Shape:
        """The share of one device under tensor parallelism: F divided.

        Raises:
            UsageError: F is no multiple of `tp_size`.
        """
        if self.intermediate_size % tp_size:
            raise UsageError(
                f"--tp-size {tp_size} does not divide the expert width {self.intermediate_size} of {self.name}.",
                "Tensor parallelism gives every device the same share of each expert.",
                "Choose a divisor.",
            )
        name = self.name if tp_size == 1 else f"{self.name} tp{tp_size}"
        return replace(self, intermediate_size=self.intermediate_size // tp_size, name=name)


PRESETS = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, source="mistralai/Mixtral-8x7B-v0.1"),
    "mixtral-8x22b": Shape(6144, 16384, 8, 2, source="mistralai/Mixtral-8x22B-v0.1"),
    "olmoe-1b-7b": Shape(2048, 1024, 64, 8, source="allenai/OLMoE-1B-7B-0924"),
    "qwen1.5-moe-a2.7b": Shape(2048, 1408, 60, 4, source="Qwen/Qwen1.5-MoE-A2.7B"),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, source="Qwen/Qwen3-30B-A3B"),
    "qwen3-235b-a22b": Shape(4096, 1536, 128, 8, source="Qwen/Qwen3-235B-A22B"),
    "qwen3-next-80b-a3b": Shape(2048, 512, 512, 10, source="Qwen/Qwen3-Next-80B-A3B-Instruct"),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6, source="deepseek-ai/DeepSeek-V2-Lite"),
    "deepseek-v3": Shape(7168, 2048, 256, 8, source="deepseek-ai/DeepSeek-V3"),
    "kimi-k2": Shape(7168, 2048, 384, 8, source="moonshotai/Kimi-K2-Instruct"),
    "glm-4.5-air": Shape(4096, 1408, 128, 8, source="zai-org/GLM-4.5-Air"),
    "minimax-m2": Shape(3072, 1536, 256, 8, source="MiniMaxAI/MiniMax-M2"),
    "phi-3.5-moe": Shape(4096, 6400, 16, 2, source="microsoft/Phi-3.5-MoE-instruct"),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, source="openai/gpt-oss-20b"),
    "gpt-oss-120b": Shape(2880, 2880, 128, 4, source="openai/gpt-oss-120b"),
}
"""Shapes by name, each with the Hub repository whose config.json says so."""

FIELDS = {
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "ffn_hidden_size",
        "intermediate_size",
        "d_ff",
    ),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k"),
}
"""Names that config.json files have for the four numbers, the most specific first."""


def choose(models: list[str], shapes: list[str], tp_size: int, revision: str | None = None) -> list[Shape]:
    """The shapes of a command line: presets or models, then `--shape`s."""
    found = [of_model(model, revision) for model in models] + [parse(text) for text in shapes]
    return [shape.split(tp_size) for shape in found]


def parse(text: str) -> Shape:
    """A shape from `d,f,E,k`.

    Raises:
        UsageError: it is not four positive numbers with k <= E.
    """
    words = text.split(",")
    numbers = [int(word) for word in words if word.strip().isdecimal()]
    if len(numbers) != len(words) or len(numbers) != 4 or min(numbers) < 1 or numbers[3] > numbers[2]:
        raise UsageError(
            f"--shape {shown(text)} is not d,f,E,k.",
            "It takes hidden size, expert width, number of experts and experts per token, the last at most the third.",
            "For example --shape 2048,768,128,8.",
        )
    hidden_size, intermediate_size, num_experts, top_k = numbers
    return Shape(hidden_size, intermediate_size, num_experts, top_k, ",".join(map(str, numbers)), "--shape")


def of_model(model: str, revision: str | None = None) -> Shape:
    """The shape of a preset, a directory, a config.json or a Hub id; only the config is read or fetched.

    Raises:
        InputError: no such thing, or its config has no experts.
        MachineError: the Hub cannot be reached.
    """
    if model in PRESETS:
        return replace(PRESETS[model], name=model)
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _from_hub(model, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown(str(path))} cannot be read: {shown(str(error))}.", "", "Give a directory with a config.json."
        ) from error
    return of_config(config if isinstance(config, dict) else {}, Path(model).resolve().name, model)


def of_config(config: dict[str, Any], name: str, source: str) -> Shape:
    """The shape that a config.json describes; composite configs are looked into (`text_config`).

    Raises:
        InputError: one of the four numbers is missing.
    """
    for part in (config, config.get("text_config"), config.get("ffn_config")):
        if not isinstance(part, dict):
            continue
        numbers = {ours: _first({**config, **part}, theirs) for ours, theirs in FIELDS.items()}
        if all(numbers.values()):
            return Shape(**numbers, name=name, source=source)
    missing = [ours for ours, theirs in FIELDS.items() if not _first(config, theirs)]
    raise InputError(
        f"{escape(source)} does not say its {', '.join(missing)}.",
        "A dense model has no experts to measure.",
        f"Give --shape d,f,E,k or one of {', '.join(PRESETS)}.",
    )


def _first(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    repo_id, _, inline = model.removeprefix("hf://").partition("@")
    fix = f"Check the spelling; the presets are {', '.join(PRESETS)}."
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=inline or revision))
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise MachineError(
                f"The config of {shown(model)} is no preset, not on disk and not in the cache, and there is no Hub.",
                shown(str(error)),
                fix,
            ) from error
        raise InputError(f"{shown(model)} is neither a preset nor a model.", shown(str(error)), fix) from error
    except (errors.HTTPError, OSError) as error:
        raise MachineError(f"The config of {shown(model)} could not be fetched.", shown(str(error)), fix) from error
