"""The models that a mixture is made of: opened, numbered as sources of one plan, and found to fit each other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.checkpoint.expressions import Expression, moved, substituted
from moectl.checkpoint.source import Checkpoint, read_json
from moectl.errors import InputError, UsageError
from moectl.families import config as configs
from moectl.families.quantised import Weights, weights_of
from moectl.families.registry import DENSE, MOE, find_pair
from moectl.families.shapes import check_tensors
from moectl.families.spec import DenseFamily, Ffn, Pair, PlainMlp
from moectl.text import escape, shown
from moectl.upcycle.btx_lora import Adapter, open_adapter, split_name
from moectl.upcycle.btx_recipe import BtxRecipe

_OWN_FIELDS = {
    "dtype",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
}
"""What may differ: it decides nothing that the models compute, or `rope_parameters` says it too."""
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Compared first, since others follow from them."""
_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Model:
    """One dense model: its weights as expressions over the plan's sources.

    Attributes:
        name: for messages and records: the checkpoint's, and its adapter's behind a plus.
        config: normalised.
        tensors: every weight by its name in the model, adapters added.
        names: in the order the model has them.
    """

    name: str
    checkpoint: Checkpoint
    weights: Weights
    config: Mapping[str, Any]
    tensors: Mapping[str, Expression]
    names: Sequence[str]

    def ffn(self, dense: DenseFamily, layer: int) -> Ffn:
        """The FFN of a layer."""
        assert not isinstance(dense.mlp, PlainMlp)
        return Ffn(*(self.of(part) for part in dense.mlp.ffn(layer, self.config["intermediate_size"]).parts))

    def of(self, x: Expression) -> Expression:
        """An expression over a dense family's tensors, over this model's."""
        return substituted(x, self.tensors)


@dataclass(frozen=True)
class Models:
    """All of them, and the pair of families they share.

    Attributes:
        sources: the plan's: the base model's checkpoint is the first.
        members: one per expert, the seed last.
        shared: the always-active expert's, if there is one.
    """

    pair: Pair
    sources: tuple[Checkpoint, ...]
    base: Model
    members: tuple[Model, ...]
    shared: Model | None

    @property
    def all(self) -> tuple[Model, ...]:
        """Each model once or more, the base first."""
        return (self.base, *self.members, *((self.shared,) if self.shared else ()))


def open_models(recipe: BtxRecipe) -> Models:
    """Open every model of a recipe and check that they can be mixed. Reads no weights (but adapters', to hash them).

    Raises:
        InputError: one cannot be used, or two do not fit each other: both are named.
        UsageError: there is no such MoE family to write.
        MachineError: the Hub cannot be reached.
    """
    opener = _Opener()
    base = opener.open(recipe.base_model)
    members = tuple(opener.open(expert.model) for expert in recipe.members)
    shared = opener.open(recipe.shared_expert.model) if recipe.shared_expert else None
    pair = _pair(base, recipe)
    models = Models(pair, tuple(opener.sources), base, members, shared)
    for other in models.all[1:]:
        _check_fit(base, other, pair, recipe)
    return models


class _Opener:
    """Opens every checkpoint and adapter once, and numbers them."""

    def __init__(self) -> None:
        self.sources: list[Checkpoint] = []
        self._places: dict[str, int] = {}
        self._adapters: dict[str, Adapter] = {}

    def open(self, name: str) -> Model:
        base, adapter_name = split_name(name)
        if base not in self._places:
            checkpoint = Checkpoint.open(base)
            place = self._place(checkpoint, str(checkpoint.path.resolve()))
            self._places[base] = place
        place = self._places[base]
        checkpoint = self.sources[place]
        if checkpoint.model_type not in DENSE:
            find_pair(checkpoint.model_type, None)  # raises with the reason
        dense = DENSE[checkpoint.model_type]
        if isinstance(dense.mlp, PlainMlp):
            raise InputError(
                f"{escape(checkpoint.name)} is an encoder-decoder ({dense.model_type}).",
                "Models are mixed one decoder to another.",
                "Give decoder-only models; `moectl upcycle sparse` takes this one.",
            )
        weights = weights_of(checkpoint)
        config = configs.normalised(dense, weights.config)
        names = check_tensors(dense, config, checkpoint, weights.shapes)
        tensors: Mapping[str, Expression] = {key: moved(x, place) for key, x in weights.tensors.items()}
        shown_name = checkpoint.name
        if adapter_name is not None:
            if adapter_name not in self._adapters:
                self._adapters[adapter_name] = open_adapter(adapter_name)
            adapter = self._adapters[adapter_name]
            assert adapter.weights.file is not None
            where = self._place(adapter.weights, str(adapter.weights.file.resolve()))
            tensors = adapter.added(tensors, weights.shapes, where)
            shown_name += f"+{adapter.name}"
        return Model(shown_name, checkpoint, weights, config, tensors, names)

    def _place(self, source: Checkpoint, path: str) -> int:
        for place, known in enumerate(self.sources):
            if str((known.file or known.path).resolve()) == path:
                return place
        self.sources.append(source)
        return len(self.sources) - 1


def _pair(base: Model, recipe: BtxRecipe) -> Pair:
    """The pair of families; a shared expert behind a gate decides among those that are not asked for by name."""
    model_type = base.checkpoint.model_type
    if recipe.shared_expert is None:
        return find_pair(model_type, recipe.into)
    from moectl.families.registry import PAIRS

    able = [pair for pair in PAIRS if pair.dense == model_type and _has_gate(pair.moe)]
    for pair in able:
        if recipe.into in (None, pair.moe):
            return pair
    raise UsageError(
        f"shared_expert: {model_type} cannot become {shown(recipe.into or 'a MoE')!r} with a gated shared expert.",
        "The family has no place for an always-active FFN behind a sigmoid.",
        f"Leave it out{', or write ' + ' or '.join(pair.moe for pair in able) if able else ''}.",
    )


def _has_gate(moe: str) -> bool:
    shared = MOE[moe].shared
    return shared is not None and shared.gate_row is not None


def _check_fit(base: Model, other: Model, pair: Pair, recipe: BtxRecipe) -> None:
    ours, theirs = base.checkpoint.model_type, other.checkpoint.model_type
    if ours != theirs:
        raise _misfit(base, other, "model_type", ours, theirs)
    dense = DENSE[ours]
    fields = sorted(({*pair.keep, *dense.defaults, *dense.names} | {"layer_types"}) - _OWN_FIELDS)
    for name in (*_SIZES, *fields):
        if base.config.get(name) != other.config.get(name):
            raise _misfit(base, other, name, base.config.get(name), other.config.get(name))
    if set(_required(base)) != set(_required(other)):
        name = min(set(_required(base)) ^ set(_required(other)))
        raise _misfit(base, other, f"tensor {name!r}", name in base.names, name in other.names)
    for name in _required(base):
        if base.weights.shapes[name] != other.weights.shapes[name]:
            raise _misfit(base, other, f"tensor {name!r}", base.weights.shapes[name], other.weights.shapes[name])
    _check_tokenizers(base, other, recipe)


def _required(model: Model) -> list[str]:
    """Every tensor but the copy that a tied head may have."""
    return [name for name in model.names if name != "lm_head.weight" or model.config["untied_head"]]


def _check_tokenizers(base: Model, other: Model, recipe: BtxRecipe) -> None:
    if recipe.allow_tokenizer_mismatch:
        return
    ours, theirs = tokenizer_hash(base.checkpoint), tokenizer_hash(other.checkpoint)
    if ours is not None and theirs is not None and ours != theirs:
        raise InputError(
            f"{escape(base.name)} and {escape(other.name)} have different tokenizers.",
            "The same token number is another text to each, so neither their embeddings nor their FFNs go together.",
            "Give models with one tokenizer, or --allow-tokenizer-mismatch if you know that they agree enough.",
        )


def tokenizer_hash(checkpoint: Checkpoint) -> str | None:
    """A hash of what decides token numbers: vocabulary, merges and special tokens; None without a tokenizer.

    A checkpoint without one (training scripts often save none) is taken to share the base model's.
    """
    path = checkpoint.path / "tokenizer.json"
    if path.exists():
        document = read_json(path)
        model = document.get("model")
        parts: list[Any] = [model.get("vocab"), model.get("merges")] if isinstance(model, dict) else [document]
        added = document.get("added_tokens")
        if isinstance(added, list):
            parts += sorted(str((each.get("id"), each.get("content"))) for each in added if isinstance(each, dict))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    found = [checkpoint.path / name for name in _TOKENIZER_FILES if (checkpoint.path / name).is_file()]
    if not found:
        return None
    return hashlib.sha256(b"".join(Path(name).read_bytes() for name in found)).hexdigest()


def _misfit(base: Model, other: Model, name: str, ours: Any, theirs: Any) -> InputError:
    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else shown(value, 80)

    return InputError(
        f"{escape(base.name)} has {name} = {text(ours)}, {escape(other.name)} has {text(theirs)}.",
        "Models are mixed weight by weight, so they must be of one shape and compute alike.",
        "Give models trained from the same seed model.",
    )
