"""Splitting (MoEfication, arXiv 2110.01786; LLaMA-MoE, arXiv 2406.16554): one FFN into E experts of a part of it each.

A gated FFN is a sum over its neurons, so it is the sum of its parts. The families' routers give the K chosen experts
weights that sum to 1, so equal scores give each 1/K, and experts whose output is K times their part sum to the parts
chosen. With K = E that is the dense function. With K < E the others are missing, and the router decides which: its
row for an expert is the mean of the expert's gate rows, as a neuron is active where its gate is (CMoE, arXiv
2502.04416, has a router of that kind), made so small that the chosen weights stay near 1/K.

Neurons that are active on the same tokens belong together, since a token then needs few experts; how alike their gate
rows are says that without data, and less well. A plan lists the neurons of every expert, so weights and statistics are
read to build it, one layer at a time.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from moectl.checkpoint.evaluate import evaluate
from moectl.checkpoint.expressions import (
    AddLowRank,
    Concat,
    Expression,
    Index,
    Init,
    Literal,
    RowMean,
    Scale,
    substituted,
)
from moectl.checkpoint.kept import identity, kept
from moectl.checkpoint.plan import Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.families import config as configs
from moectl.families.quantised import weights_of
from moectl.families.registry import DENSE, MOE, PAIRS, find_pair
from moectl.families.shapes import check_tensors
from moectl.families.spec import Config, Ffn, MoeFamily, Pair, PlainMlp
from moectl.upcycle.block import MoeLayer, check_dense_layers, check_experts
from moectl.upcycle.experts import scale_factors, scaled
from moectl.upcycle.planning import facts_of, tensors_of
from moectl.upcycle.recipe import chosen_layers
from moectl.upcycle.shared import SILENT_WIDTH
from moectl.upcycle.split_assign import clusters
from moectl.upcycle.split_card import split_card
from moectl.upcycle.split_recipe import SplitRecipe
from moectl.upcycle.split_statistics import Activations, pattern

ANALYTIC_SCALE = 2.0**-6
"""What mean gate rows are multiplied by: the order of scores stays, and chosen weights differ by a few per cent."""


def plan_split(
    source: Checkpoint,
    recipe: SplitRecipe,
    activations: Activations | None = None,
    directory: Path | None = None,
) -> Plan:
    """The plan of a MoE checkpoint whose experts are the parts of a dense one's FFNs.

    Reads the gate (and up) matrices, a layer at a time, for k-means, and no weights for random.

    Args:
        activations: of the source, from `split_statistics.activations`; needed where `recipe.measured`.
        directory: where k-means' result is kept, as layers.{layer}.expert [F], int32, the number of the expert that
            each neuron goes to, -1 for a shared one; what is there is taken, and no weights are read.

    Raises:
        UsageError: the recipe is impossible, or the pair of families is unknown or cannot hold it.
        InputError: the checkpoint is not what its config says, or the FFN cannot be cut like that.
    """
    recipe.check()
    pair = split_pair(source, recipe)
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    weights = weights_of(source)
    config = configs.normalised(dense, weights.config)
    names = check_tensors(dense, config, source, weights.shapes)
    width = _part_width(config["intermediate_size"], recipe)
    layers = chosen_layers(recipe.layers, config["num_hidden_layers"])
    dense_layers = [layer for layer in range(config["num_hidden_layers"]) if layer not in layers]
    check_dense_layers(pair, dense_layers)
    assert not recipe.measured or activations is not None, "shared experts and active clusters need activations"
    fields = {
        "num_experts": recipe.routed,
        "top_k": recipe.active,
        "expert_width": width,
        "dense_layers": dense_layers,
        "norm_topk": True,
        "aux_loss": recipe.aux_loss_coef,
        "shared_width": _shared_width(moe, recipe, width),
        "shared_count": _shared_width(moe, recipe, width) // width,
    }
    moe_config = configs.translated(pair, config, moe, fields, None if recipe.dtype == "auto" else recipe.dtype)

    mlp = dense.mlp
    assert not isinstance(mlp, PlainMlp)

    def assigned() -> dict[str, np.ndarray]:
        found = {}
        for layer in layers:
            whole = mlp.ffn(layer, config["intermediate_size"])
            parts = (substituted(part, weights.tensors) for part in whole.parts)
            found[_name(layer)] = _assignment(
                source, Ffn(*parts), config["intermediate_size"], recipe, layer, activations
            )
        return found

    if directory is None or recipe.grouping == "random":
        expert_of = assigned()
    else:
        decides = {
            **identity(source),
            "layers": list(layers),
            "how": [recipe.grouping, recipe.experts, recipe.shared, recipe.seed],
            "activations": None if activations is None else activations.to_json(),
        }
        file = kept(directory, "neurons", decides, assigned)
        expert_of = {name: file.read(name) for name in file.tensors}

    def block(layer: int, ffn: Ffn) -> MoeLayer:
        shared, *parts = _parts(expert_of[_name(layer)], recipe.routed)
        return _block(layer, ffn, shared, parts, moe, config, recipe)

    tensors = tuple(tensors_of(source, weights, pair, names, config, layers, recipe.dtype, block))
    recorded = {"method": "split", **asdict(recipe), "into": moe.model_type}
    recorded |= {"top_k": recipe.active, "router": recipe.routing}
    if activations is not None:
        recorded["statistics"] = activations.to_json()
    idle = (recipe.routed - recipe.active) * len(layers) * 3 * config["hidden_size"] * width
    exact = recipe.keeps_function and (recipe.dtype == "auto" or weights.scheme is not None)
    facts = facts_of(source, weights, dense, moe, tensors, idle=idle, exact=exact)
    return Plan(
        sources=(source,),
        tensors=tensors,
        recipe=recorded,
        config=moe_config,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        files={"README.md": split_card(source, moe, recorded, facts)},
        facts=facts,
    )


def split_pair(source: Checkpoint, recipe: SplitRecipe) -> Pair:
    """The pair of families, refused where it cannot hold what the recipe asks for.

    Raises:
        InputError: the dense family is not one that can be split.
        UsageError: the MoE family cannot hold it.
    """
    pair = find_pair(source.model_type, recipe.into)
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    if isinstance(dense.mlp, PlainMlp):
        raise InputError(
            f"{dense.model_type} cannot be split.",
            "Its FFN has no gate, and its MoE family's router takes one expert and scales it by its score.",
            "Give a decoder-only model, or use moectl upcycle sparse.",
        )
    check_experts(moe, recipe.routed)
    fields = {"shared_width", "shared_count"} & set(moe.fields)
    if recipe.shared and (moe.shared is None or not (fields or recipe.shared == 1)):
        able = [
            other.moe
            for other in PAIRS
            if other.dense == pair.dense and {"shared_width", "shared_count"} & set(MOE[other.moe].fields)
        ]
        into = f"give --into {' or '.join(able)}, or " if able else ""
        has = "no shared expert" if moe.shared is None else "one shared expert, as wide as a routed one"
        raise UsageError(
            f"{moe.model_type} has {has}, and --shared {recipe.shared} asks for {recipe.shared}.",
            "Its readers would drop the tensors.",
            f"To go on, {into}leave --shared out.",
        )
    return pair


def _name(layer: int) -> str:
    return f"layers.{layer}.expert"


def _parts(expert_F: np.ndarray, experts: int) -> list[tuple[int, ...]]:
    """The shared neurons, then those of each routed expert: together every neuron once, in ascending order in each."""
    return [tuple(np.flatnonzero(expert_F == expert).tolist()) for expert in range(-1, experts)]


def _assignment(
    source: Checkpoint, ffn: Ffn, size: int, recipe: SplitRecipe, layer: int, activations: Activations | None
) -> np.ndarray:
    """The number of the routed expert that each neuron goes to [F], int32; -1 for a shared one."""
    count = recipe.shared * (size // recipe.experts)
    order = np.arange(size) if activations is None else np.argsort(-activations.rates[layer], kind="stable")
    rest = np.sort(order[count:])
    features_ND = None
    if recipe.grouping == "active":
        assert activations is not None
        features_ND = pattern(activations.patterns[layer])[rest]
    elif recipe.grouping != "random":
        rows = ffn.gate if recipe.grouping == "kmeans-gate" else Concat((ffn.gate, ffn.up), 1)
        features_ND = _computed(rows, source)[rest]
    expert_F = np.full(size, -1, np.int32)
    expert_F[rest] = clusters(recipe.grouping, features_ND, rest, recipe.routed, recipe.seed, f"layers.{layer}.neurons")
    return expert_F


def _block(
    layer: int,
    ffn: Ffn,
    shared: tuple[int, ...],
    parts: list[tuple[int, ...]],
    moe: MoeFamily,
    config: Config,
    recipe: SplitRecipe,
) -> MoeLayer:
    factors = scale_factors(recipe.active, recipe.scale)
    experts = tuple(
        Ffn(*(x if f == 1.0 else Scale(x, f) for x, f in zip(_part(ffn, part).parts, factors, strict=True)))
        for part in parts
    )
    router = _router(ffn, parts, config["hidden_size"], recipe, f"layers.{layer}")
    if moe.shared is None or (not shared and moe.shared.default == "none"):
        return MoeLayer(layer, router, experts)
    gate_row = Literal((1, config["hidden_size"]), 0.0) if moe.shared.gate_row else None
    if shared:
        always = _part(ffn, shared)
        return MoeLayer(layer, router, experts, scaled(always, 2.0) if gate_row else always, gate_row)
    width = _shared_width(moe, recipe, len(parts[0]))
    some = _part(ffn, parts[0][:width])
    silent = Ffn(some.gate, some.up, Literal((config["hidden_size"], width), 0.0))
    return MoeLayer(layer, router, experts, silent, gate_row)


def _router(ffn: Ffn, parts: list[tuple[int, ...]], hidden_size: int, recipe: SplitRecipe, key: str) -> Expression:
    """The rows [E, H]; analytic ones less the mean over all neurons, which no softmax and no order of scores sees.

    Mean gate rows have most of their length in common, and bfloat16 scores would drown in it.
    """
    if recipe.routing == "zero":
        return Literal((recipe.routed, hidden_size), 0.0)
    if recipe.routing == "random":
        return Init((recipe.routed, hidden_size), recipe.router_std, f"{key}.router")
    rows = Concat(tuple(RowMean(Index(ffn.gate, 0, part)) for part in parts), 0)
    centred = AddLowRank(rows, Literal((recipe.routed, 1), 1.0), RowMean(ffn.gate), -1.0)
    return Scale(centred, ANALYTIC_SCALE)


def _part(ffn: Ffn, neurons: tuple[int, ...]) -> Ffn:
    return Ffn(Index(ffn.gate, 0, neurons), Index(ffn.up, 0, neurons), Index(ffn.down, 1, neurons))


def _shared_width(moe: MoeFamily, recipe: SplitRecipe, width: int) -> int:
    """The shared expert's width: that of its parts; of a silent one where there are none but the family has it."""
    if recipe.shared:
        return recipe.shared * width
    if moe.shared is None or moe.shared.default == "none":
        return 0
    return min(SILENT_WIDTH, width) if "shared_width" in moe.fields else width


def _part_width(intermediate_size: int, recipe: SplitRecipe) -> int:
    if intermediate_size % recipe.experts:
        raise InputError(
            f"config.json has intermediate_size = {intermediate_size}, not a multiple of --experts {recipe.experts}.",
            "Every expert is that part of the FFN.",
            "Choose a number that divides it.",
        )
    return intermediate_size // recipe.experts


def _computed(x: Expression, source: Checkpoint) -> np.ndarray:
    tensor = planned("neurons", x, (source,), "F32")
    raw = b"".join(evaluate(tensor, (source,), 0))
    return np.frombuffer(raw, "<f4").reshape(tensor.shape)
