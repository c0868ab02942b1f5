"""Check a dense checkpoint's tensors against its config: every name, every shape, nothing missing, nothing more."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.spec import Config, DenseFamily
from moectl.text import escape


def expected_tensors(family: DenseFamily, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor a normalised config asks for, in the order a model has them."""
    present = [spec for spec in (*family.tensors, *family.mlp_tensors) if spec.when is None or config[spec.when]]
    shapes = {spec: resolved(spec.shape, config) for spec in present}
    whole = [spec for spec in present if "{layer}" not in spec.name]
    for spec in whole[:1]:
        yield spec.name, shapes[spec]
    layered = [spec for spec in present if "{layer}" in spec.name]
    for count in dict.fromkeys(spec.layers for spec in layered):
        for layer in range(config[count]):
            for spec in layered:
                if spec.layers == count and (spec.kind is None or spec.kind == config["layer_types"][layer]):
                    yield spec.name.format(layer=layer), shapes[spec]
    for spec in whole[1:]:
        yield spec.name, shapes[spec]


def check_tensors(
    family: DenseFamily,
    config: Config,
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """The names of the tensors that belong to the model, in the order of `expected_tensors`.

    A tied model may store its head too; it then goes along, and transformers decides as it would for the source.
    `shapes` are those of the weights by their names in the model, where these are not the stored ones.

    Raises:
        InputError: a tensor is missing, has another shape, or does not belong to the family.
    """
    layers = config["num_hidden_layers"]
    held = {name: ref.shape for name, ref in checkpoint.tensors.items()} if shapes is None else shapes
    if layers > len(held):
        raise _bad(checkpoint, f"has {len(held)} tensors, but num_hidden_layers is {layers}")
    names = []
    optional = ((spec.name, resolved(spec.shape, config)) for spec in family.optional if spec.name in held)
    for name, shape in itertools.chain(expected_tensors(family, config), optional):
        found = held.get(name)
        if found is None:
            raise _bad(checkpoint, f"lacks tensor {name!r} of shape {list(shape)}, which its config asks for")
        if found != shape:
            raise _bad(checkpoint, f"has tensor {name!r} of shape {list(found)}, expected {list(shape)} by its config")
        names.append(name)
    wanted = set(names)
    for name in held:
        if name in wanted or any(_pattern(ignored).fullmatch(name) for ignored in family.ignored):
            continue
        if name == "lm_head.weight" and not config["untied_head"]:
            names.append(name)
            continue
        raise _bad(
            checkpoint, f"holds tensor {escape(name)!r}, which is no part of {family.architecture} as configured"
        )
    return names


_SYMBOLS = {
    "V": ("vocab_size",),
    "H": ("hidden_size",),
    "F": ("intermediate_size",),
    "Q": ("num_attention_heads", "head_dim"),
    "KV": ("num_key_value_heads", "head_dim"),
    "D": ("head_dim",),
}


def resolved(shape: tuple[str, ...], config: Config) -> tuple[int, ...]:
    """A shape in numbers: each entry is a sum of terms, each of an optional factor and a symbol or config field."""
    return tuple(sum(_term(term, config) for term in entry.split("+")) for entry in shape)


def _term(term: str, config: Config) -> int:
    name = term.lstrip("0123456789")
    fields = _SYMBOLS.get(name, (name,) if name else ())
    return math.prod((int(term[: len(term) - len(name)] or 1), *(config[field] for field in fields)))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"))


def _bad(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{escape(str(checkpoint.path))} {what}.",
        "transformers would fill such a gap with random weights, so nothing was done.",
        "Check that config.json belongs to these weights, or fetch the checkpoint again.",
    )
