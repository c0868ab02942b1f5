"""The model card of a checkpoint with coded experts: first of all how it loads, as other ways go wrong silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.checkpoint.source import Checkpoint
from moectl.text import escape


def qmoe_card(source: Checkpoint, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of README.md, with front matter for the Hub."""
    name = escape(source.name)
    kind = "compressed-tensors" if recipe["export"] else "qmoe"
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [moe, quantization, {kind}, moectl]",
    ]
    front += inherited(source)
    if source.commit:
        front += ["base_model:", f"- {name}"]
    before = 8 * facts["source_bytes"] / facts["source_parameters"]
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}, compressed",
        "",
        *(export_lines() if recipe["export"] else card_lines(bool(source.config.get("is_encoder_decoder")))),
        "",
        "| | source | this model |",
        "|---|---|---|",
        f"| parameters | {facts['source_parameters']:,} | {facts['parameters']:,} |",
        f"| bytes | {facts['source_bytes']:,} | {facts['weight_bytes']:,} |",
        f"| bits per parameter | {before:.2f} | {facts['bits_per_parameter']:.3f} |",
        f"| bits per parameter of experts | | {facts['bits_per_expert_parameter']:.3f} |",
        "",
        *left_out(facts["ignored"]),
        "It has not been trained since: measure what it lost with `moectl eval`.",
        "",
        "## Recipe",
        "",
        "Hashes of every tensor, the source and the plan are in `moectl.json`.",
        "",
        "```json",
        json.dumps(dict(recipe), indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def left_out(tensors: int) -> list[str]:
    """That so many tensors of the source are not in the output, if any are."""
    which = "Tensors that the model has no place for, such as those of layers that predict further tokens, are left out"
    return [f"{which}: {tensors}.", ""] if tensors else []


def export_lines() -> list[str]:
    """How an export is loaded."""
    return [
        "Experts are packed in the format of [compressed-tensors](https://github.com/vllm-project/compressed-tensors).",
        "They are named as vLLM's loader expects it, which was read, not run. transformers loads them with",
        "`pip install compressed-tensors`, and makes plain weights of them.",
    ]


def card_lines(encoder_decoder: bool = False) -> list[str]:
    """What has to stand first: transformers alone does not refuse such a checkpoint; and how it is loaded."""
    auto = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    return [
        "> [!WARNING]",
        "> Without the first of these lines, transformers gives this model **random experts** and only warns.",
        "> With them it loads as it is, coded, and every expert is decoded when a token needs it:",
        "",
        "```python",
        "import moectl.integrations.transformers  # pip install moectl",
        f"from transformers import {auto}",
        "",
        f"model = {auto}.from_pretrained(path)  # or moectl.integrations.transformers.load(path), which checks",
        "```",
        "",
        "`moectl generate MODEL --prompt ...` writes text with it, and `moectl decompress MODEL -o DENSE` makes it an",
        "ordinary checkpoint for every other program.",
    ]
