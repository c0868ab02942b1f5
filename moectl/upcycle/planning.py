"""The plan that a sparse upcycling ends in, of one stack or two: the recipe as recorded, the facts, the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moectl.checkpoint.plan import OutputTensor, Plan
from moectl.checkpoint.source import Checkpoint
from moectl.families.quantised import Weights
from moectl.families.spec import DenseFamily, MoeFamily
from moectl.upcycle.card import model_card
from moectl.upcycle.recipe import SparseRecipe


def finished_plan(
    source: Checkpoint,
    weights: Weights,
    dense: DenseFamily,
    moe: MoeFamily,
    recipe: SparseRecipe,
    config: Mapping[str, Any],
    tensors: tuple[OutputTensor, ...],
    *,
    per_expert: int,
    exact: bool,
    notes: str = "",
) -> Plan:
    """The plan to write `tensors` and `config`, with what to record and report of a recipe that is decided.

    `per_expert` counts the parameters of one routed expert over all layers. `exact` says whether the result computes
    the dense function; a quantised source stands for the model its weights dequantise to, up to one rounding of those
    to the output's dtype. `notes` go into the model card.
    """
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    recorded = {"method": "sparse", **asdict(recipe), "into": moe.model_type}
    facts = {
        "family": moe.model_type,
        "source_family": dense.model_type,
        "source_parameters": sum(math.prod(shape) for shape in weights.shapes.values()),
        "source_bytes": source.nbytes,
        "parameters": total,
        "active_parameters": total - (recipe.experts - recipe.top_k) * per_expert,
        "dequantised": weights.scheme,
        "exact": exact,
    }
    return Plan(
        sources=(source,),
        tensors=tensors,
        recipe=recorded,
        config=config,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        files={"README.md": model_card(source, moe, recorded, facts, notes)},
        facts=facts,
    )
