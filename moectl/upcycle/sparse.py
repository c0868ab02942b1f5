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
from moectl.checkpoint.expressions import Copy, Expression, Init, Literal, Noise, Slice
from moectl.checkpoint.plan import DEFAULT_SHARD_BYTES, OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families import config as configs
from moectl.families.registry import DENSE, MOE, find_pair
from moectl.families.shapes import check_tensors
from moectl.families.spec import DenseFamily, MoeFamily
from moectl.upcycle.card import model_card

SHARED_WIDTH = 128
"""Width of the silent shared expert that a family with a mandatory one gets.

Zero would be smaller, and transformers accepts it, but vLLM's qwen2_moe builds no shared expert then and stops at
the (empty) tensors transformers wants to find. 128 divides by every usual tensor-parallel size.
"""


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
    width = min(SHARED_WIDTH, config["intermediate_size"])
    fields = {
        "num_experts": recipe.experts,
        "top_k": recipe.top_k,
        "expert_width": config["intermediate_size"],
        "norm_topk": True,
        "aux_loss": recipe.aux_loss_coef,
        "shared_expert_intermediate_size": width,
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
    """Every tensor in the order the model has them; a layer's gate matrix stands for the whole FFN."""
    layer_of = {dense.mlp.gate.format(layer=layer): layer for layer in range(config["num_hidden_layers"])}
    replaced = {
        pattern.format(layer=layer) for layer in layer_of.values() for pattern in (dense.mlp.up, dense.mlp.down)
    }
    cast = TORCH_NAMES.get(recipe.dtype)
    for name in names:
        if name in layer_of:
            yield from _moe_block(source, dense, moe, layer_of[name], config, recipe, cast)
        elif name not in replaced:
            is_float = source.tensors[name].dtype in FLOATS
            yield planned(name, Copy(name), (source,), cast if is_float else None)


def _moe_block(
    source: Checkpoint,
    dense: DenseFamily,
    moe: MoeFamily,
    layer: int,
    config: dict[str, Any],
    recipe: SparseRecipe,
    cast: str | None,
) -> Iterator[OutputTensor]:
    hidden = config["hidden_size"]
    gate, up, down = (pattern.format(layer=layer) for pattern in (dense.mlp.gate, dense.mlp.up, dense.mlp.down))
    dtype = cast or source.tensors[gate].dtype
    router = moe.router.format(layer=layer)
    yield planned(router, Init((recipe.experts, hidden), recipe.router_std, router), (source,), dtype)
    for expert in range(recipe.experts):
        for pattern, origin in ((moe.mlp.gate, gate), (moe.mlp.up, up), (moe.mlp.down, down)):
            name = pattern.format(layer=layer, expert=expert)
            copy: Expression = Copy(origin)
            yield planned(name, Noise(copy, recipe.noise, name) if recipe.noise else copy, (source,), cast)
    if moe.shared:
        # Silent (down is zero) but not dead: its gate and up are neurons of the dense FFN, so down has a gradient.
        width = min(SHARED_WIDTH, config["intermediate_size"])
        silent: dict[str, Expression] = {
            moe.shared.mlp.gate: Slice(Copy(gate), 0, 0, width),
            moe.shared.mlp.up: Slice(Copy(up), 0, 0, width),
            moe.shared.mlp.down: Literal((hidden, width), 0.0),
            moe.shared.gate_row: Literal((1, hidden), 0.0),
        }
        for pattern, expression in silent.items():
            yield planned(pattern.format(layer=layer), expression, (source,), dtype)


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
