"""What plans of a MoE from one dense model have in common: the tensors in order, the facts, the plan they end in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, substituted
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.families.quantised import Weights
from moectl.families.registry import DENSE, MOE
from moectl.families.spec import DenseFamily, Ffn, MoeFamily, Pair, PlainMlp
from moectl.upcycle.block import MoeLayer, emit
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
    recorded = {"method": "sparse", **asdict(recipe), "into": moe.model_type}
    idle = (recipe.experts - recipe.top_k) * per_expert
    facts = facts_of(source, weights, dense, moe, tensors, idle=idle, exact=exact)
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


def facts_of(
    source: Checkpoint,
    weights: Weights,
    dense: DenseFamily,
    moe: MoeFamily,
    tensors: tuple[OutputTensor, ...],
    *,
    idle: int,
    exact: bool,
) -> dict[str, Any]:
    """What is reported of a MoE made from one dense model; `idle` counts the parameters that a token does not use."""
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    return {
        "family": moe.model_type,
        "source_family": dense.model_type,
        "source_parameters": sum(math.prod(shape) for shape in weights.shapes.values()),
        "source_bytes": source.nbytes,
        "parameters": total,
        "active_parameters": total - idle,
        "dequantised": weights.scheme,
        "exact": exact,
    }


def tensors_of(
    source: Checkpoint,
    weights: Weights,
    pair: Pair,
    names: list[str],
    config: dict[str, Any],
    layers: tuple[int, ...],
    dtype: str,
    block: Callable[[int, Ffn], MoeLayer],
) -> Iterator[OutputTensor]:
    """Every tensor in the order the model has them; the first of a layer's FFN stands for the whole of it.

    `block` makes the MoE layer of one of `layers` from its FFN. `dtype` is "auto" or what floats are cast to.
    """
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    assert not isinstance(dense.mlp, PlainMlp)
    cast = TORCH_NAMES.get(dtype)
    first, *others = (spec.name for spec in dense.mlp.tensors)
    layer_of = {first.format(layer=layer): layer for layer in layers}
    replaced = {pattern.format(layer=layer) for layer in layers for pattern in others}
    rewritten = pair.rewritten(config["num_hidden_layers"], config)
    for name in names:
        own = weights.dtypes[name]
        if name in layer_of:
            ffn = dense.mlp.ffn(layer_of[name], config["intermediate_size"])
            ffn = Ffn(*(substituted(part, weights.tensors) for part in ffn.parts))
            yield from emit(block(layer_of[name], ffn), moe, (source,), cast or own)
        elif name not in replaced:
            for new, expression in rewritten.get(name, {name: Copy(name)}).items():
                expression = substituted(expression, weights.tensors)
                yield planned(new, expression, (source,), cast if cast and own in FLOATS else own)
