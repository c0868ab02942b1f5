"""Branch-Train-MiX (arXiv 2403.07816, section 2.2): several dense models of one origin become one MoE.

Each model's FFN is an expert of every layer; everything else is the mean over the models, computed in float64 and
rounded once. With `include_seed` the model they branched from is one more expert and in the mean with the others, as
in the paper, whose fourth expert is the seed. Equal models give the dense model again: the mean of equal numbers is
the number, and top-k weights that sum to 1 leave equal experts' output as it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy, Expression, Index, Init, Mean
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families import config as configs
from moectl.families.registry import DENSE, MOE
from moectl.families.spec import Ffn, PlainMlp
from moectl.text import escape
from moectl.upcycle.block import MoeLayer, check_dense_layers, check_experts, emit
from moectl.upcycle.btx_card import btx_card
from moectl.upcycle.btx_models import Model, Models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert
from moectl.upcycle.experts import routed_experts, scaled
from moectl.upcycle.recipe import chosen_layers
from moectl.upcycle.shared import Shared, check_width, shared_expert, shared_kind, shared_width
from moectl.upcycle.statistics import router_statistics


def plan_btx(models: Models, recipe: BtxRecipe, directory: Path) -> Plan:
    """The plan of a MoE checkpoint made from several dense ones.

    Reads no weights, unless router rows are made from texts: then the base model is run over these, and the rows lie
    in `directory` as Statistics, a source of the plan.

    Raises:
        UsageError: the recipe is impossible.
        InputError: the MoE family cannot hold the models, or texts cannot be read or run.
    """
    recipe.check()
    pair, base = models.pair, models.base
    dense, moe = DENSE[pair.dense], MOE[pair.moe]
    config = base.config
    width = _expert_width(base, recipe)
    layers = chosen_layers(recipe.layers, config["num_hidden_layers"])
    dense_layers = [layer for layer in range(config["num_hidden_layers"]) if layer not in layers]
    check_dense_layers(pair, dense_layers)
    check_experts(moe, recipe.num_experts)
    kind = shared_kind(pair, None)
    check_width(kind, moe, recipe.split)
    whole = config["intermediate_size"]
    fields = {
        "num_experts": recipe.num_experts,
        "top_k": recipe.top_k,
        "expert_width": width,
        "dense_layers": dense_layers,
        "norm_topk": True,
        "aux_loss": recipe.aux_loss_coef,
        "shared_width": whole if models.shared else shared_width(kind, whole),
        "shared_count": recipe.split if kind == "copy" else 0,
    }
    moe_config = configs.translated(pair, config, moe, fields, None if recipe.dtype == "auto" else recipe.dtype)
    statistics = None
    sources = models.sources
    if recipe.router_init != "random":
        gate = recipe.shared_expert
        statistics = router_statistics(base.checkpoint, recipe.members, recipe, layers, directory, gate=gate)
        sources = (*sources, statistics)
    builder = _Builder(models, recipe, sources, None if statistics is None else len(sources) - 1)
    tensors = tuple(builder.tensors(layers))
    recorded = _recorded(models, recipe, moe.model_type, statistics)
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    per_expert = len(layers) * 3 * config["hidden_size"] * width
    schemes = sorted({model.weights.scheme for model in models.all if model.weights.scheme})
    facts = {
        "family": moe.model_type,
        "source_family": dense.model_type,
        "source_parameters": sum(math.prod(shape) for shape in base.weights.shapes.values()),
        "source_bytes": sum(source.nbytes for source in models.sources),
        "parameters": total,
        "active_parameters": total - (recipe.num_experts - recipe.top_k) * per_expert,
        "dequantised": ", ".join(schemes) or None,
        "exact": False,
    }
    return Plan(
        sources=sources,
        tensors=tensors,
        recipe=recorded,
        config=moe_config,
        seed=recipe.seed,
        shard_bytes=recipe.shard_bytes,
        files={"README.md": btx_card(models, moe, recorded, facts)},
        facts=facts,
    )


class _Builder:
    """Makes the output's tensors; `statistics` is the place of the router rows among the sources."""

    def __init__(
        self, models: Models, recipe: BtxRecipe, sources: tuple[Checkpoint, ...], statistics: int | None
    ) -> None:
        self._models, self._recipe, self._sources, self._statistics = models, recipe, sources, statistics
        self._dense, self._moe = DENSE[models.pair.dense], MOE[models.pair.moe]
        self._weights = recipe.weights()

    def tensors(self, layers: tuple[int, ...]) -> Iterator[OutputTensor]:
        """Every tensor in the order the model has them; the first of a layer's FFN stands for the whole of it."""
        base, cast = self._models.base, TORCH_NAMES.get(self._recipe.dtype)
        assert not isinstance(self._dense.mlp, PlainMlp)
        first, *others = (spec.name for spec in self._dense.mlp.tensors)
        layer_of = {first.format(layer=layer): layer for layer in layers}
        replaced = {pattern.format(layer=layer) for layer in layers for pattern in others}
        rewritten = self._models.pair.rewritten(base.config["num_hidden_layers"], base.config)
        for name in base.names:
            own = base.weights.dtypes[name]
            if name in layer_of:
                yield from emit(self._layer(layer_of[name]), self._moe, self._sources, cast or own)
            elif name not in replaced and all(name in model.tensors for model in self._averaged):
                for new, expression in rewritten.get(name, {name: Copy(name)}).items():
                    yield planned(new, self._mean(expression), self._sources, cast if cast and own in FLOATS else own)

    @property
    def _averaged(self) -> tuple[Model, ...]:
        return (self._models.base,) if self._weights is None else self._models.members

    def _mean(self, x: Expression) -> Expression:
        """An expression over a dense family's tensors, averaged over the models."""
        if self._weights is None:
            return self._models.base.of(x)
        kept = [(model.of(x), w) for model, w in zip(self._models.members, self._weights, strict=True) if w]
        if len(kept) == 1:
            return kept[0][0]
        parts, weights = zip(*kept, strict=True)
        return Mean(parts, None if len(set(weights)) == 1 else weights)

    def _layer(self, layer: int) -> MoeLayer:
        models, recipe, moe = self._models, self._recipe, self._moe
        base = models.base
        key, hidden, width = f"layers.{layer}", base.config["hidden_size"], base.config["intermediate_size"]
        shared = self._shared(layer, hidden, width)
        experts: list[Ffn] = []
        for number, (model, expert) in enumerate(zip(models.members, recipe.members, strict=True)):
            ffn, place = model.ffn(self._dense, layer), f"{key}.models.{number}"
            experts += _varied(ffn, expert, recipe, width, place, shared.routed_scale)
        if moe.shared is not None and models.shared is not None:
            assert recipe.shared_expert is not None
            whole = replace(recipe, split=1)
            (ffn,) = _varied(models.shared.ffn(self._dense, layer), recipe.shared_expert, whole, width, f"{key}.shared")
            shared = Shared(ffn, self._gate(key, hidden))
        return MoeLayer(layer, self._router(key, hidden), tuple(experts), shared.ffn, shared.gate_row)

    def _shared(self, layer: int, hidden: int, width: int) -> Shared:
        """The always-active expert of families that must have one: of the base model."""
        kind = shared_kind(self._models.pair, None)
        return shared_expert(kind, self._models.base.ffn(self._dense, layer), self._moe, hidden, width)

    def _router(self, key: str, hidden: int) -> Expression:
        """The router [E, H]: a row per model, the same for all parts that its FFN is cut into."""
        members, split = len(self._models.members), self._recipe.split
        rows: Expression = Init((members, hidden), self._recipe.router_std, f"{key}.router")
        if self._statistics is not None:
            rows = Copy(f"{key}.router", self._statistics)
        if split == 1:
            return rows
        return Index(rows, 0, tuple(number // split for number in range(members * split)))

    def _gate(self, key: str, hidden: int) -> Expression:
        if self._statistics is not None:
            return Copy(f"{key}.shared_gate", self._statistics)
        return Init((1, hidden), self._recipe.router_std, f"{key}.shared_gate")


def _varied(ffn: Ffn, expert: Expert, recipe: BtxRecipe, width: int, key: str, scale: float = 1.0) -> tuple[Ffn, ...]:
    """The parts of one model's FFN, with its noise and its residual scale."""
    parts = routed_experts(ffn, width, recipe.of_model(expert), key, scale)
    if expert.residual_scale == 1.0:
        return parts
    return tuple(scaled(part, expert.residual_scale) for part in parts)


def _expert_width(base: Model, recipe: BtxRecipe) -> int:
    width: int = base.config["intermediate_size"]
    if width % recipe.split:
        raise InputError(
            f"{escape(base.name)} has intermediate_size = {width}, not a multiple of --split {recipe.split}.",
            "Every expert is that part of an FFN.",
            "Choose a split that divides it.",
        )
    return width // recipe.split


def _recorded(models: Models, recipe: BtxRecipe, into: str, statistics: Checkpoint | None) -> dict[str, Any]:
    """What was asked for, as provenance keeps it: models by name, texts by number and hash."""

    def said(expert: Expert, model: Model) -> dict[str, Any]:
        texts = "\0".join((*expert.prompts, "", *expert.negative_prompts, "", *expert.data))
        digest = hashlib.sha256(texts.encode(errors="surrogatepass")).hexdigest() if texts.strip("\0") else None
        return {
            "model": model.name,
            "noise": expert.noise,
            "residual_scale": expert.residual_scale,
            "texts": len(expert.prompts) + len(expert.negative_prompts) + len(expert.data),
            "texts_sha256": digest,
        }

    whole = {"method": "btx", **asdict(recipe), "into": into, "num_experts": recipe.num_experts}
    whole["experts"] = [said(*each) for each in zip(recipe.members, models.members, strict=True)]
    whole["include_seed"] = recipe.include_seed is not None
    whole["base"] = models.base.name
    if models.shared and recipe.shared_expert:
        whole["shared_expert"] = said(recipe.shared_expert, models.shared)
    whole["statistics"] = statistics.commit if statistics else None
    return whole
