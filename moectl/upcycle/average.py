"""The weight average of dense models of one origin (model soups, arXiv 2203.05482): one dense model.

What a mixture of the same models has to beat to be worth its experts. As in Branch-Train-MiX's own average, each number
is a mean in float64, rounded once.
"""

from __future__ import annotations

import json
import math
from typing import Any

from moectl.checkpoint.card import inherited
from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Expression, Mean
from moectl.checkpoint.plan import Plan, planned
from moectl.errors import UsageError
from moectl.families.registry import DENSE
from moectl.text import escape, shown
from moectl.upcycle.btx_models import Models
from moectl.upcycle.btx_recipe import BtxRecipe


def plan_average(models: Models, recipe: BtxRecipe) -> Plan:
    """The plan of the dense checkpoint whose every weight is the mean over the models, weighted as `average` says.

    Of the recipe it reads the models, `average`, `dtype` and `shard_bytes`. Reads no weights.

    Raises:
        UsageError: as `weights_of`.
    """
    base, weights = models.base, weights_of(recipe)
    cast = TORCH_NAMES.get(recipe.dtype)

    def mean(name: str) -> Expression:
        kept = [(model.of(Copy(name)), w) for model, w in zip(models.members, weights, strict=True) if w]
        parts, shares = zip(*kept, strict=True)
        return Mean(parts, None if len(set(shares)) == 1 else shares)

    tensors = []
    for name in base.names:
        own = base.weights.dtypes[name]
        if all(name in model.tensors for model in models.members):
            tensors.append(planned(name, mean(name), models.sources, cast if cast and own in FLOATS else own))
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    names = [model.name for model in models.members]
    recorded = {"method": "average", "models": names, "average": recipe.average, "dtype": recipe.dtype}
    family = DENSE[models.pair.dense].model_type
    config = {**base.weights.config, **({} if recipe.dtype == "auto" else {"dtype": recipe.dtype})}
    return Plan(
        sources=models.sources,
        tensors=tuple(tensors),
        recipe=recorded,
        config=config,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        files={"README.md": _card(models, recorded, total)},
        facts={
            "family": family,
            "source_family": family,
            "source_parameters": sum(math.prod(shape) for shape in base.weights.shapes.values()),
            "source_bytes": sum(source.nbytes for source in models.sources),
            "parameters": total,
            "active_parameters": total,
            "dequantised": ", ".join(sorted({m.weights.scheme for m in models.all if m.weights.scheme})) or None,
            "exact": False,
        },
    )


def weights_of(recipe: BtxRecipe) -> tuple[float, ...]:
    """One weight per model.

    Raises:
        UsageError: `average` does not give each model one.
    """
    try:
        weights = recipe.weights()
    except UsageError:
        weights = None
    if weights is None:
        raise UsageError(
            f"--weights {shown(recipe.average)!r} are not the weights of {len(recipe.experts)} models.",
            "Every model has one in the average.",
            "Give one number of at least 0 per model, such as 2,1,1, or leave it out.",
        ) from None
    return weights


def _card(models: Models, recipe: dict[str, Any], parameters: int) -> str:
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [merge, moectl]"]
    lines = [
        "---",
        *front,
        *inherited(models.base.checkpoint),
        "---",
        "",
        f"# The weight average of {len(models.members)} models",
        "",
        f"Each of the {parameters:,} weights is the mean ([arXiv 2203.05482](https://arxiv.org/abs/2203.05482)) of",
        f"those of {', '.join(f'`{escape(model.name)}`' for model in models.members)}, in float64, rounded once.",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"
