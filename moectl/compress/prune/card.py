"""The model card of a pruned checkpoint: what it is, of what, and on what its experts were chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.recipe import METHODS
from moectl.text import escape


def prune_card(source: Checkpoint, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of README.md, with front matter for the Hub."""
    name = escape(source.name)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, pruning, moectl]"]
    front += inherited(source)
    if source.commit:
        front += ["base_model:", f"- {name}"]
    about = recipe["scores"] or {}
    measured = ["They were chosen without data. How much it lost differs from domain to domain."]
    if "data" in about:
        data = ", ".join(f"`{escape(each)}`" for each in about["data"])
        measured = [
            f"They were chosen on {about['tokens']:,} tokens of {data}.",
            "On text unlike that it can be much worse, and its generation can break where its loss hardly moves.",
        ]
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name} with {facts['experts']} of {facts['source_experts']} experts",
        "",
        f"Every MoE layer of `{name}` without some of its experts; {facts['top_k']} are active per token, as before.",
        f"Those that stay are the best by `{recipe['saliency']}`: {METHODS[recipe['saliency']]}.",
        *measured,
        "It has not been trained since: measure it with `moectl eval`.",
        "",
        "| | source | this model |",
        "|---|---|---|",
        f"| parameters | {facts['source_parameters']:,} | {facts['parameters']:,} |",
        f"| bytes | {facts['source_bytes']:,} | {facts['weight_bytes']:,} |",
        "",
        "## Recipe",
        "",
        "Which experts stayed, and hashes of every tensor, the source and the plan, are in `moectl.json`.",
        "",
        "```json",
        json.dumps({key: value for key, value in recipe.items() if key != "kept"}, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"
