"""The model card (README.md) of a Branch-Train-MiX checkpoint: of which models it is, and what became of each part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.families.spec import MoeFamily
from moectl.text import escape
from moectl.upcycle.btx_models import Models


def btx_card(models: Models, moe: MoeFamily, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of README.md, with front matter for the Hub."""
    names = [escape(model.name) for model in models.members]
    known = dict.fromkeys(model.checkpoint.name for model in models.all if model.checkpoint.commit)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, merge, moectl]"]
    front += inherited(models.base.checkpoint)
    if known:
        front += ["base_model:", *(f"- {escape(name)}" for name in known)]
    average = {
        "mean": "the mean of all models'",
        "base": f"those of `{escape(models.base.name)}`",
    }.get(recipe["average"], f"the mean of all models', weighted {recipe['average']}")
    rows = {
        "random": f"drawn at random (standard deviation {recipe['router_std']:g})",
        "text": "made from example texts of each expert",
        "embedding": "made from the token embeddings of each expert's example texts",
    }[recipe["router_init"]]
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {moe.architecture} mixed from {len(names)} models",
        "",
        f"A Mixture-of-Experts of {recipe['num_experts']} experts per layer, {recipe['top_k']} active per token, made",
        "by Branch-Train-MiX ([arXiv 2403.07816](https://arxiv.org/abs/2403.07816)): each model's FFN is an expert of",
        f"every MoE layer; attention, norms, embeddings and head are {average}. Router rows are {rows}.",
        "It is meant to be trained further; until then it computes what none of its models computed.",
        "",
        "| expert | model |",
        "|---|---|",
        *(f"| {_numbers(i, recipe['split'])} | `{name}` |" for i, name in enumerate(names)),
        "",
        "| | this model |",
        "|---|---|",
        f"| parameters | {facts['parameters']:,} |",
        f"| active per token | {facts['active_parameters']:,} |",
        "",
        "Training it further needs `output_router_logits=True` for the load-balancing loss to count",
        f"(`router_aux_loss_coef` is {recipe['aux_loss_coef']}).",
        "",
        "## Recipe",
        "",
        "Hashes of every tensor, the sources and the plan are in `moectl.json`; `moectl verify MODEL` checks them.",
        "",
        "```json",
        json.dumps(dict(recipe), indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _numbers(member: int, split: int) -> str:
    return str(member) if split == 1 else f"{member * split}-{(member + 1) * split - 1}"
