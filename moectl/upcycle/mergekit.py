"""mergekit-moe configs as recipes: the base model's attention, norms and embeddings, each expert's FFN.

Fields and meaning as in mergekit 0.1.5 (`mergekit/moe/config.py`, `router.py`). Where it is known to go wrong, the
recipe differs, and a note says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl.text import shown
from moectl.upcycle.btx_recipe import BtxRecipe, Expert
from moectl.upcycle.recipe_file import Document, build

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_INTO = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
_GATES = {
    "hidden": ("text", "last"),
    "hidden_last": ("text", "last"),
    "hidden_avg": ("text", "all"),
    "cheap_embed": ("embedding", "all"),
    "random": ("random", "all"),
    "uniform_random": ("random", "all"),
}
_NOTES = {
    "text": "gate_mode {mode}: rows come from the vectors the router will see, behind the norm; mergekit takes those "
    "before attention.",
    "embedding": "gate_mode {mode}: rows are scaled to a stated spread of the logits; mergekit's have length 1.",
    "random": "gate_mode {mode}: rows are normal with standard deviation 0.02; mergekit's saturate the router.",
}


@dataclass(frozen=True, slots=True)
class MergekitExpert:
    """mergekit's `Expert`."""

    source_model: str
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None


@dataclass(frozen=True, slots=True)
class MergekitConfig:
    """mergekit's `MoEMergeConfig`."""

    base_model: str
    experts: tuple[MergekitExpert, ...]
    gate_mode: str = field(default="hidden", metadata={"choices": tuple(_GATES)})
    dtype: str | None = None
    experts_per_token: int = 2
    shared_experts: tuple[MergekitExpert, ...] | None = None
    architecture: str | None = None


def is_config(data: Any) -> bool:
    """Whether plain data is a mergekit-moe config rather than a recipe of ours."""
    if not isinstance(data, dict):
        return False
    experts = data.get("experts")
    first = experts[0] if isinstance(experts, list) and experts else None
    return bool({"base_model", "gate_mode"} & data.keys()) or (isinstance(first, dict) and "source_model" in first)


def translated(document: Document) -> tuple[BtxRecipe, tuple[str, ...]]:
    """The recipe that a mergekit-moe config means, and what differs from what mergekit would do.

    Raises:
        InputError: a field is unknown, of the wrong type, or asks for what moectl does not do; the field is named.
    """
    config = build(MergekitConfig, document)
    shared = config.shared_experts or ()
    if len(shared) > 1:
        raise document.bad(("shared_experts",), "is a list of several", "Give one: no family holds several whole FFNs.")
    init, tokens = _GATES[config.gate_mode]
    recipe = BtxRecipe(
        experts=tuple(_expert(each) for each in config.experts),
        base=_model(config.base_model),
        shared_expert=_expert(shared[0]) if shared else None,
        average="base",
        into=_into(document, config.architecture),
        top_k=config.experts_per_token,
        router_init=init,
        router_tokens=tokens,
        dtype=_dtype(document, config.dtype),
    )
    return recipe, (_NOTES[init].format(mode=config.gate_mode),)


def _expert(said: MergekitExpert) -> Expert:
    return Expert(
        model=_model(said.source_model),
        prompts=said.positive_prompts or (),
        negative_prompts=said.negative_prompts or (),
        noise=said.noise_scale,
        residual_scale=1.0 if said.residual_scale is None else said.residual_scale,
    )


def _model(value: str) -> str:
    """A model reference: a path or Hub id, perhaps with @revision and +lora; ours write Hub revisions hf://id@rev."""
    parts = []
    for part in value.split("+"):
        name, _, revision = part.partition("@")
        parts.append(f"hf://{name}@{revision}" if revision and not _exists(part) else part)
    return "+".join(parts)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or holding a NUL: no path, and refused later for what it is
        return False


def _dtype(document: Document, value: str | None) -> str:
    if value is None:
        return "auto"
    if _DTYPES.get(value, value) not in _DTYPES.values():
        raise document.bad(("dtype",), f"is {shown(value)!r}", f"Give {', '.join(_DTYPES.values())}.")
    return _DTYPES.get(value, value)


def _into(document: Document, value: str | None) -> str | None:
    """mergekit matches the beginning of its own names: Mixtral, Qwen MoE, Qwen3 MoE, DeepSeek MoE."""
    if value is None:
        return None
    word = value.lower().split()
    if not word or word[0] not in _INTO:
        raise document.bad(
            ("architecture",), f"is {shown(value)!r}", f"Give one of {', '.join(_INTO)}, or leave it out."
        )
    return _INTO[word[0]]
