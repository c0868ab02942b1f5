"""The model card of a checkpoint whose experts are parts of a dense FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.checkpoint.source import Checkpoint
from moectl.families.spec import MoeFamily
from moectl.text import escape
from moectl.upcycle.card import equivalence_and_recipe, sizes_and_loading


def split_card(source: Checkpoint, moe: MoeFamily, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of README.md, with front matter for the Hub and a place for `moectl verify --write-card`."""
    name = escape(source.name)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, moefication, moectl]"]
    front += inherited(source)
    if source.commit:
        front += ["base_model:", f"- {name}"]
    routed, top_k = recipe["experts"] - recipe["shared"], recipe["top_k"]
    always = f", {recipe['shared']} always active" if recipe["shared"] else ""
    if facts["exact"]:
        same = "Every part is active, so it computes the same function as its source until it is trained further."
    elif top_k == routed:
        same = "Every part is active, but its router or its rounding makes it close to its source, not equal."
    else:
        same = (
            f"A token passes through {top_k} of its {routed} routed parts, so it is worse than its source: "
            "measure how much with `moectl eval`, and train it further to win some of it back."
        )
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {moe.architecture} split from {name}",
        "",
        f"The FFN of every MoE layer is that of `{name}`, cut into {recipe['experts']} experts{always}.",
        f"Neurons were grouped by `{recipe['grouping']}`, and the router is `{recipe['router']}`",
        "([arXiv 2110.01786](https://arxiv.org/abs/2110.01786), [2406.16554](https://arxiv.org/abs/2406.16554),",
        "[2502.04416](https://arxiv.org/abs/2502.04416)).",
        same,
        "",
        *sizes_and_loading(facts),
        "",
        *equivalence_and_recipe(recipe),
    ]
    return "\n".join(lines) + "\n"
