"""Sparse upcycling (arXiv 2212.05055): every expert starts as the dense FFN, and a new router chooses among them.

With equal experts and top-k weights that sum to 1, the MoE computes exactly what the dense model did, whatever
the router says: sum_j w_j FFN(x) = FFN(x). `noise` gives that up for diversity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families import config as configs
from moectl.families.quantised import weights_of
from moectl.families.registry import DENSE, MOE, find_pair
from moectl.families.shapes import check_tensors
from moectl.families.spec import Ffn, MoeFamily
from moectl.upcycle.block import MoeLayer, check_dense_layers, check_experts
from moectl.upcycle.experts import routed_experts, router_rows
from moectl.upcycle.planning import finished_plan, tensors_of
from moectl.upcycle.recipe import SparseRecipe, chosen_layers
from moectl.upcycle.shared import Kind, check_width, shared_expert, shared_kind, shared_width
from moectl.upcycle.switch import plan_switch


def plan_sparse(source: Checkpoint, recipe: SparseRecipe) -> Plan:
    """The plan of a MoE checkpoint made from a dense one. Reads no weights.

    Raises:
        UsageError: the recipe is impossible, or the pair of families is unknown.
        InputError: the checkpoint is not what its config says, or the MoE family cannot hold it.
    """
    recipe.check()
    pair = find_pair(source.model_type, recipe.into)
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    if recipe.router_std is None:
        recipe = replace(recipe, router_std=moe.router_std)
    if moe.encoder is not None:
        return plan_switch(source, pair, dense, moe, recipe)
    weights = weights_of(source)
    config = configs.normalised(dense, weights.config)
    names = check_tensors(dense, config, source, weights.shapes)
    width = _expert_width(config["intermediate_size"], recipe)
    moe_layers = chosen_layers(recipe.layers, config["num_hidden_layers"])
    dense_layers = [layer for layer in range(config["num_hidden_layers"]) if layer not in moe_layers]
    check_dense_layers(pair, dense_layers)
    shared = shared_kind(pair, "residual" if recipe.residual else "copy" if recipe.shared_experts else None)
    check_experts(moe, recipe.experts)
    check_width(shared, moe, recipe.granularity)
    fields = {
        "num_experts": recipe.experts,
        "top_k": recipe.top_k,
        "expert_width": width,
        "dense_layers": dense_layers,
        "norm_topk": True,
        "aux_loss": recipe.aux_loss_coef,
        "shared_width": shared_width(shared, config["intermediate_size"]),
        "shared_count": recipe.granularity if shared in ("copy", "residual") else 0,
    }
    dtype = None if recipe.dtype == "auto" else recipe.dtype
    moe_config = configs.translated(pair, config, moe, fields, dtype)

    def block(layer: int, ffn: Ffn) -> MoeLayer:
        return _moe_layer(layer, ffn, moe, shared, config, recipe)

    tensors = tuple(tensors_of(source, weights, pair, names, config, moe_layers, recipe.dtype, block))
    return finished_plan(
        source,
        weights,
        dense,
        moe,
        recipe,
        moe_config,
        tensors,
        per_expert=len(moe_layers) * 3 * config["hidden_size"] * width,
        exact=recipe.keeps_function and (recipe.dtype == "auto" or weights.scheme is not None),
    )


def _moe_layer(
    layer: int, ffn: Ffn, moe: MoeFamily, kind: Kind, config: dict[str, Any], recipe: SparseRecipe
) -> MoeLayer:
    """Experts made from the FFN behind a random router; draws are keyed by place, not by the family's tensor names."""
    key, hidden = f"layers.{layer}", config["hidden_size"]
    shared = shared_expert(kind, ffn, moe, hidden, config["intermediate_size"])
    experts = routed_experts(ffn, config["intermediate_size"], recipe, key, shared.routed_scale)
    return MoeLayer(layer, router_rows(hidden, recipe, key), experts, shared.ffn, shared.gate_row)


def _expert_width(intermediate_size: int, recipe: SparseRecipe) -> int:
    if intermediate_size % recipe.granularity:
        raise InputError(
            f"config.json has intermediate_size = {intermediate_size}, not a multiple of --granularity "
            f"{recipe.granularity}.",
            "Every expert is that part of the FFN.",
            "Choose a granularity that divides it.",
        )
    return intermediate_size // recipe.granularity
