"""Sparse upcycling of an encoder-decoder (T5 -> Switch, arXiv 2212.05055): two stacks, top-1, weights p_e.

Expert e gives p_e * FFN_e(x), so every `wo` is the dense one times E. With a router of zeros p_e is 1/E and the result
is the dense function; with a random router p_e is the largest of E probabilities, more than 1/E, and it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Expression, Init, Literal, Noise, Scale, substituted
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.families import config as configs
from moectl.families.quantised import Weights, weights_of
from moectl.families.shapes import check_tensors
from moectl.families.spec import DenseFamily, MoeFamily, Pair, PlainMlp
from moectl.text import shown
from moectl.upcycle.planning import finished_plan
from moectl.upcycle.recipe import SparseRecipe, chosen_layers

_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_UNFIT = {
    "--granularity": "granularity",
    "--scale": "scale",
    "--shared-experts": "shared_experts",
    "--residual": "residual",
    "--drop": "drop",
    "--shuffle": "shuffle",
    "--reinit": "reinit",
}
"""Options without a meaning here, and the fields of the recipe they set."""


def plan_switch(source: Checkpoint, pair: Pair, dense: DenseFamily, moe: MoeFamily, recipe: SparseRecipe) -> Plan:
    """The plan of a Switch checkpoint made from a T5, for a recipe whose router_std is decided. Reads no weights.

    Raises:
        UsageError: the recipe asks for what the family cannot do.
        InputError: the checkpoint is not what its config says, or it is a T5 v1.1.
    """
    _check(recipe, moe)
    weights = weights_of(source)
    config = configs.normalised(dense, weights.config)
    stacks = _stacks(dense, moe)
    encoder, decoder = (_count_sparse(recipe, moe, config[experts.layers]) for _, _, experts in stacks)
    fields = {
        "num_experts": recipe.experts,
        "expert_width": config["intermediate_size"],
        "aux_loss": recipe.aux_loss_coef,
        "sparse_encoder": encoder,
        "sparse_decoder": decoder,
    }
    moe_config = configs.translated(pair, config, moe, fields, None if recipe.dtype == "auto" else recipe.dtype)
    names = check_tensors(dense, config, source, weights.shapes)
    tensors = tuple(_tensors(source, weights, stacks, names, config, recipe))
    return finished_plan(
        source,
        weights,
        dense,
        moe,
        recipe,
        moe_config,
        tensors,
        per_expert=(encoder + decoder) * 2 * config["hidden_size"] * config["intermediate_size"],
        exact=_is_exact(recipe, weights, names),
        notes=_notes(recipe, moe),
    )


def _stacks(dense: DenseFamily, moe: MoeFamily) -> tuple[tuple[PlainMlp, str, PlainMlp], ...]:
    """For encoder and decoder: the dense FFN, the router's name, the experts."""
    assert dense.encoder_mlp and moe.encoder and isinstance(dense.mlp, PlainMlp) and isinstance(moe.mlp, PlainMlp)
    return (dense.encoder_mlp, *moe.encoder), (dense.mlp, moe.router, moe.mlp)


def _tensors(
    source: Checkpoint,
    weights: Weights,
    stacks: tuple[tuple[PlainMlp, str, PlainMlp], ...],
    names: list[str],
    config: dict[str, Any],
    recipe: SparseRecipe,
) -> Iterator[OutputTensor]:
    """Every tensor in the order the model has them; `wi` stands for the whole of a layer's FFN."""
    cast = TORCH_NAMES.get(recipe.dtype)
    made: dict[str, dict[str, Expression]] = {}
    for ffn, router, experts in stacks:
        sparse = chosen_layers(recipe.layers, config[experts.layers])
        for layer in range(config[experts.layers]):
            up, down = ffn.up.format(layer=layer), ffn.down.format(layer=layer)
            moe = layer in sparse
            key = f"{experts.up.partition('.')[0]}.layers.{layer}"
            made[up] = (
                _moe_layer(layer, up, down, router, experts, key, config["hidden_size"], recipe)
                if moe
                else {
                    pattern.replace(".experts.expert_{expert}", "").format(layer=layer): Copy(old)
                    for pattern, old in ((experts.up, up), (experts.down, down))
                }
            )
            made[down] = {}
    if not config["scale_decoder_outputs"]:
        # Switch shares nothing between embeddings and head then, so each has to be there.
        copies = [name for name in _EMBEDDINGS if name not in names]
        made["shared.weight"] = {name: Copy("shared.weight") for name in ("shared.weight", *copies)}
    for name in names:
        own = weights.dtypes[name]
        for new, expression in made.get(name, {name: Copy(name)}).items():
            dtype = cast if cast and own in FLOATS else own
            yield planned(new, substituted(expression, weights.tensors), (source,), dtype)


def _moe_layer(
    layer: int, up: str, down: str, router: str, experts: PlainMlp, key: str, hidden: int, recipe: SparseRecipe
) -> dict[str, Expression]:
    """Router and experts of one layer by name; draws are keyed by place, not by the family's tensor names."""
    shape = recipe.experts, hidden
    rows = Init(shape, recipe.router_std, f"{key}.router") if recipe.router_std else Literal(shape, 0.0)
    tensors: dict[str, Expression] = {router.format(layer=layer): rows}
    for number in range(recipe.experts):
        wi: Expression = Copy(up)
        wo: Expression = Scale(Copy(down), float(recipe.experts)) if recipe.experts > 1 else Copy(down)
        if recipe.noise:
            place = f"{key}.experts.{number}"
            # Noise is in the dense weights' units, so it goes in before the factor.
            wi = Noise(wi, recipe.noise, f"{place}.up")
            wo = Scale(Noise(Copy(down), recipe.noise, f"{place}.down"), float(recipe.experts))
        tensors[experts.up.format(layer=layer, expert=number)] = wi
        tensors[experts.down.format(layer=layer, expert=number)] = wo
    return tensors


def _check(recipe: SparseRecipe, moe: MoeFamily) -> None:
    if recipe.top_k != 1:
        raise UsageError(
            f"--top-k {recipe.top_k}: {moe.model_type} sends each token to one expert.",
            "Its router has no other way, so the number would be ignored.",
            "Give --top-k 1.",
        )
    plain = SparseRecipe()
    for option, name in _UNFIT.items():
        if getattr(recipe, name) != getattr(plain, name):
            raise UsageError(
                f"{option} is not possible with {moe.model_type}.",
                "Its FFN has no gate, and its single expert per token is a whole FFN.",
                "Leave the option out.",
            )


def _count_sparse(recipe: SparseRecipe, moe: MoeFamily, layers: int) -> int:
    """How many layers of a stack are MoE: the config can say all, or every second one from the second on."""
    if recipe.layers == "every:2" and layers < 2:
        raise InputError(
            "config.json has a stack of one layer, which --layers every:2 leaves dense.",
            "transformers makes the only layer of a stack a MoE layer whatever the config says.",
            "Leave --layers out.",
        )
    if recipe.layers not in ("all", "every:2"):
        raise UsageError(
            f"--layers {shown(recipe.layers)!r} is not possible with {moe.model_type}.",
            "Its config states a step for each stack, and no list of layers.",
            "Give all or every:2.",
        )
    return layers if recipe.layers == "all" else layers // 2


def _is_exact(recipe: SparseRecipe, weights: Weights, names: list[str]) -> bool:
    """Whether it is the dense function: 1/E and `wo` times E round to 16 bits unless E is a power of two."""
    rounds = recipe.experts & (recipe.experts - 1) and any(weights.dtypes[name] != "F32" for name in names)
    kept = recipe.dtype == "auto" or weights.scheme is not None
    return not recipe.router_std and not recipe.noise and kept and not rounds


def _notes(recipe: SparseRecipe, moe: MoeFamily) -> str:
    capacity = (
        f"Each expert takes up to {moe.values['expert_capacity']} tokens of a sequence (`expert_capacity`) and drops "
        "the rest: lower it only for training."
    )
    if recipe.layers == "all":
        # `if self.encoder.config.encoder_sparse_step > 1` in transformers 5.23
        capacity += " transformers leaves the router's losses out of a model of MoE layers alone (`--layers all`)."
    if not recipe.router_std:
        return (
            f"Its router is zero, so every token goes to expert 0 with probability 1/{recipe.experts}, and `wo` is "
            f"{recipe.experts} times the dense one. {capacity}"
        )
    return (
        f"Its router is random (standard deviation {recipe.router_std:g}) and the family does not renormalise "
        f"probabilities: the FFN's output is multiplied by {recipe.experts} times the largest of {recipe.experts} "
        f"probabilities, which is above 1. `--router-std 0` is the dense function. {capacity}"
    )
