"""Sparse upcycling (arXiv 2212.05055): every expert starts as the dense FFN, and a new router chooses among them.

With equal experts and top-k weights that sum to 1, the MoE computes exactly what the dense model did, whatever
the router says: sum_j w_j FFN(x) = FFN(x). `noise` gives that up for diversity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Init
from moectl.checkpoint.plan import DEFAULT_SHARD_BYTES, OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families import config as configs
from moectl.families.registry import DENSE, MOE, find_pair
from moectl.families.shapes import check_tensors
from moectl.families.spec import DenseFamily, Ffn, MoeFamily
from moectl.upcycle.block import MoeLayer, emit
from moectl.upcycle.card import model_card
from moectl.upcycle.experts import routed_experts
from moectl.upcycle.shared import shared_expert, shared_width


@dataclass(frozen=True, slots=True)
class SparseRecipe:
    """What `moectl upcycle sparse` was asked for.

    Attributes:
        experts, top_k: experts per layer, and how many each token is sent to.
        into: model_type of the MoE family; None for the dense family's first.
        router_std: standard deviation of the normal router rows (flaxformer's and Mixtral's 0.02 by default).
        noise: standard deviation of the normal noise added to every expert weight, in the weights' own units.
        aux_loss_coef: load-balancing coefficient written into the config for continued training.
        dtype: "auto" keeps every tensor's own, else bfloat16, float16 or float32.
        seed: of router and noise; each tensor's draws depend on (seed, its name) alone.
        shard_bytes: largest weight file.
    """

    experts: int = 8
    top_k: int = 2
    into: str | None = None
    router_std: float = 0.02
    noise: float = 0.0
    aux_loss_coef: float = 0.01
    dtype: str = "auto"
    seed: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value out of its range.
        """
        if not 1 <= self.top_k <= self.experts:
            raise UsageError(
                f"--top-k {self.top_k} of --experts {self.experts} is impossible.",
                "Each token is sent to top-k different experts.",
                f"Give --top-k from 1 to {self.experts}.",
            )
        for name, value in (
            ("--router-std", self.router_std),
            ("--noise", self.noise),
            ("--aux-loss-coef", self.aux_loss_coef),
        ):
            if not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"{name} {value} is not a finite number of at least 0.", "", "Give another value.")
        if self.dtype not in ("auto", *TORCH_NAMES) or TORCH_NAMES.get(self.dtype) == "F64":
            raise UsageError(f"--dtype {self.dtype!r} is not known.", "", "Give auto, bfloat16, float16 or float32.")
        if self.shard_bytes < 1:
            raise UsageError("--shard-size is below one byte.", "", "Give a size such as 5GB.")


def plan_sparse(source: Checkpoint, recipe: SparseRecipe) -> Plan:
    """The plan of a MoE checkpoint made from a dense one. Reads no weights.

    Raises:
        UsageError: the recipe is impossible, or the pair of families is unknown.
        InputError: the checkpoint is not what its config says, or the MoE family cannot hold it.
    """
    recipe.check()
    pair = find_pair(source.model_type, recipe.into)
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    config = configs.normalised(dense, source.config)
    names = check_tensors(dense, config, source)
    fields = {
        "num_experts": recipe.experts,
        "top_k": recipe.top_k,
        "expert_width": config["intermediate_size"],
        "norm_topk": True,
        "aux_loss": recipe.aux_loss_coef,
        "shared_width": shared_width(moe, config["intermediate_size"]),
    }
    dtype = None if recipe.dtype == "auto" else recipe.dtype
    moe_config = configs.translated(pair, config, moe, fields, dtype)
    tensors = tuple(_tensors(source, dense, moe, names, config, recipe))
    normal_recipe = {"method": "sparse", **asdict(recipe), "into": moe.model_type}
    facts = _facts(source, dense, moe, tensors, recipe, config)
    card = model_card(source, moe, normal_recipe, facts)
    return Plan(
        sources=(source,),
        tensors=tensors,
        recipe=normal_recipe,
        config=moe_config,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        files={"README.md": card},
        facts=facts,
    )


def _tensors(
    source: Checkpoint,
    dense: DenseFamily,
    moe: MoeFamily,
    names: list[str],
    config: dict[str, Any],
    recipe: SparseRecipe,
) -> Iterator[OutputTensor]:
    """Every tensor in the order the model has them; the first of a layer's FFN stands for the whole of it."""
    cast = TORCH_NAMES.get(recipe.dtype)
    first, *others = (spec.name for spec in dense.mlp.tensors)
    layers = range(config["num_hidden_layers"])
    layer_of = {first.format(layer=layer): layer for layer in layers}
    replaced = {pattern.format(layer=layer) for layer in layers for pattern in others}
    for name in names:
        ref = source.tensors[name]
        if name in layer_of:
            ffn = dense.mlp.ffn(layer_of[name], config["intermediate_size"])
            block = _moe_layer(layer_of[name], ffn, moe, config, recipe)
            yield from emit(block, moe, (source,), cast or ref.dtype)
        elif name not in replaced:
            yield planned(name, Copy(name), (source,), cast if ref.dtype in FLOATS else None)


def _moe_layer(layer: int, ffn: Ffn, moe: MoeFamily, config: dict[str, Any], recipe: SparseRecipe) -> MoeLayer:
    """Experts made from the FFN behind a random router; draws are keyed by place, not by the family's tensor names."""
    key, hidden = f"layers.{layer}", config["hidden_size"]
    shared = shared_expert(ffn, moe, hidden, config["intermediate_size"])
    router = Init((recipe.experts, hidden), recipe.router_std, f"{key}.router")
    experts = routed_experts(ffn, recipe.experts, key, noise=recipe.noise, scale=shared.routed_scale)
    return MoeLayer(layer, router, experts, shared.ffn, shared.gate_row)


def _facts(
    source: Checkpoint,
    dense: DenseFamily,
    moe: MoeFamily,
    tensors: tuple[OutputTensor, ...],
    recipe: SparseRecipe,
    config: dict[str, Any],
) -> dict[str, Any]:
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    per_expert = 3 * config["hidden_size"] * config["intermediate_size"] * config["num_hidden_layers"]
    return {
        "family": moe.model_type,
        "source_family": dense.model_type,
        "source_parameters": sum(math.prod(ref.shape) for ref in source.tensors.values()),
        "source_bytes": source.nbytes,
        "parameters": total,
        "active_parameters": total - (recipe.experts - recipe.top_k) * per_expert,
        "layers": config["num_hidden_layers"],
        "exact": recipe.noise == 0 and recipe.dtype == "auto",
    }
