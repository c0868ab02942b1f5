"""The model card (README.md) of a checkpoint moectl made: what it is, of what, how, and how equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.checkpoint.source import Checkpoint
from moectl.families.spec import MoeFamily
from moectl.text import escape

EQUIVALENCE_START = "<!-- moectl verify: start -->"
EQUIVALENCE_END = "<!-- moectl verify: end -->"


def model_card(
    source: Checkpoint, moe: MoeFamily, recipe: Mapping[str, Any], facts: Mapping[str, Any], notes: str = ""
) -> str:
    """The text of README.md, with front matter for the Hub and a place for `moectl verify --write-card`.

    `notes` says how far a result that is not exact is off, and what else its user has to know.
    """
    name = escape(source.name)
    pipeline, auto = ("text-generation", "AutoModelForCausalLM")
    if moe.encoder is not None:
        pipeline, auto = ("text2text-generation", "AutoModelForSeq2SeqLM")
    front = ["library_name: transformers", f"pipeline_tag: {pipeline}", "tags: [moe, upcycling, moectl]"]
    front += inherited(source)
    if source.commit:
        front += ["base_model:", f"- {name}"]
    origin = f"[{name}](https://huggingface.co/{name}) at commit `{source.commit}`" if source.commit else f"`{name}`"
    experts, top_k = recipe["experts"], recipe["top_k"]
    origin_weights = "the dequantised weights of its source" if facts["dequantised"] else "its source"
    same = (
        f"It computes the same function as {origin_weights} until it is trained further."
        if facts["exact"]
        else "Its experts differ from the dense FFN by noise or rounding, so it is close to its source, not equal."
    )
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {moe.architecture} upcycled from {name}",
        "",
        f"A Mixture-of-Experts of {experts} experts per layer, {top_k} active per token, made from {origin} by sparse",
        "upcycling ([arXiv 2212.05055](https://arxiv.org/abs/2212.05055)): every expert is a copy of the dense FFN.",
        same,
        *([notes] if notes else []),
        "",
        *sizes_and_loading(facts, auto),
        "",
        "Training it further needs `output_router_logits=True` for the load-balancing loss to count",
        f"(`router_aux_loss_coef` is {recipe['aux_loss_coef']}).",
        "",
        *equivalence_and_recipe(recipe),
    ]
    return "\n".join(lines) + "\n"


def sizes_and_loading(facts: Mapping[str, Any], auto: str = "AutoModelForCausalLM") -> list[str]:
    """Lines of a card of one source: parameters before and after, and how the model is loaded."""
    return [
        "| | source | this model |",
        "|---|---|---|",
        f"| parameters | {facts['source_parameters']:,} | {facts['parameters']:,} |",
        f"| active per token | {facts['source_parameters']:,} | {facts['active_parameters']:,} |",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f"model = {auto}.from_pretrained(path)",
        "```",
    ]


def equivalence_and_recipe(recipe: Mapping[str, Any]) -> list[str]:
    """The last lines of a card of one source: a place for what `moectl verify` measures, and the recipe."""
    return [
        "## Equivalence",
        "",
        EQUIVALENCE_START,
        "Not measured yet: `moectl verify MODEL --against SOURCE --write-card` puts the numbers here.",
        EQUIVALENCE_END,
        "",
        "## Recipe",
        "",
        "Hashes of every tensor, the source and the plan are in `moectl.json`; `moectl verify MODEL` checks them.",
        "",
        "```json",
        json.dumps(dict(recipe), indent=2),
        "```",
    ]


def with_equivalence(card: str, measured: str) -> str:
    """The card with its equivalence section replaced, or appended where the markers are gone."""
    section = f"{EQUIVALENCE_START}\n{measured.strip()}\n{EQUIVALENCE_END}"
    start, end = card.find(EQUIVALENCE_START), card.find(EQUIVALENCE_END)
    if 0 <= start < end:
        return card[:start] + section + card[end + len(EQUIVALENCE_END) :]
    return f"{card.rstrip()}\n\n## Equivalence\n\n{section}\n"
