"""Check a dense checkpoint's tensors against its config: every name, every shape, nothing missing, nothing more."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moectl.checkpoint.header import escape
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.spec import Config, DenseFamily


def expected_tensors(family: DenseFamily, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor a normalised config asks for, in the order a model has them."""
    sizes = _symbols(config)
    present = [spec for spec in (*family.tensors, *family.mlp.tensors) if spec.when is None or config[spec.when]]
    whole = [spec for spec in present if "{layer}" not in spec.name]
    for spec in whole[:1]:
        yield spec.name, tuple(sizes[symbol] for symbol in spec.shape)
    for layer in range(config["num_hidden_layers"]):
        for spec in present:
            if "{layer}" in spec.name:
                yield spec.name.format(layer=layer), tuple(sizes[symbol] for symbol in spec.shape)
    for spec in whole[1:]:
        yield spec.name, tuple(sizes[symbol] for symbol in spec.shape)


def check_tensors(family: DenseFamily, config: Config, checkpoint: Checkpoint) -> list[str]:
    """The names of the tensors that belong to the model, in the order of `expected_tensors`.

    A tied model may store its head too; it then goes along, and transformers decides as it would for the source.

    Raises:
        InputError: a tensor is missing, has another shape, or does not belong to the family.
    """
    layers = config["num_hidden_layers"]
    if layers > len(checkpoint.tensors):
        raise _bad(checkpoint, f"has {len(checkpoint.tensors)} tensors, but num_hidden_layers is {layers}")
    names = []
    for name, shape in expected_tensors(family, config):
        ref = checkpoint.tensors.get(name)
        if ref is None:
            raise _bad(checkpoint, f"lacks tensor {name!r} of shape {list(shape)}, which its config asks for")
        if ref.shape != shape:
            raise _bad(
                checkpoint, f"has tensor {name!r} of shape {list(ref.shape)}, expected {list(shape)} by its config"
            )
        names.append(name)
    wanted = set(names)
    for name in checkpoint.tensors:
        if name in wanted or any(_pattern(ignored).fullmatch(name) for ignored in family.ignored):
            continue
        if name == "lm_head.weight" and not config["untied_head"]:
            names.append(name)
            continue
        raise _bad(
            checkpoint, f"holds tensor {escape(name)!r}, which is no part of {family.architecture} as configured"
        )
    return names


def _symbols(config: Config) -> dict[str, int]:
    head_dim = config["head_dim"]
    return {
        "V": config["vocab_size"],
        "H": config["hidden_size"],
        "F": config["intermediate_size"],
        "2F": 2 * config["intermediate_size"],
        "Q": config["num_attention_heads"] * head_dim,
        "KV": config["num_key_value_heads"] * head_dim,
        "D": head_dim,
    }


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"))


def _bad(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{escape(str(checkpoint.path))} {what}.",
        "transformers would fill such a gap with random weights, so nothing was done.",
        "Check that config.json belongs to these weights, or fetch the checkpoint again.",
    )
