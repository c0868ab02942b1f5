"""Putting a router into a model: which families can take one, and which routers they can take.

Legend: D hidden, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import InputError, UsageError
from moectl.integrations.recorded import recorded_routers
from moectl.integrations.routed.depth import HeldLayer, decoder_layers
from moectl.integrations.routed.held import Form, Held, HeldRouter, Passing, become
from moectl.integrations.routed.slots import HeldSlots
from moectl.routers.layers.peer import Neurons
from moectl.routers.protocol import Router
from moectl.routers.registry import Entry, find
from moectl.text import escape

Make = Callable[[], nn.Module]

UNFIT = {
    "mone": "Its experts are nested in one another, and a family's are not.",
    "moa": "It chooses among attention heads.",
    "switchhead": "It chooses among attention heads.",
    "sparse-is-enough": "It chooses neurons inside of an FFN.",
}
"""Routers that no MoE layer of a transformers model can take, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a router stands: its module and that of the layer around it, the form of its choice, and the sizes."""

    name: str
    module: nn.Module
    block: nn.Module
    form: Form
    hidden_size: int
    num_experts: int


def install(model: Any, router: Mapping[str, Any]) -> dict[str, Make]:
    """Give every MoE layer of a model the router of that name with those options (the rest are its defaults).

    Returns what made the modules that are new in the model, by their names.

    Raises:
        InputError: the model has no MoE layers, or some whose routers cannot be replaced.
        UsageError: there is no such router or option, or it is not for this model.
    """
    entry = find(router["name"])
    check_fit(entry)
    options = entry.load().Options(**router["options"])
    passing = Passing()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == model.get_input_embeddings().num_embeddings:
            module.register_forward_pre_hook(passing.hear)
    if entry.name == "mod":
        return _hold_layers(model, entry, options, passing)
    found = places(model)
    for place in found:  # some families initialise a layer's router with the layer
        place.block._is_hf_initialized = True  # type: ignore[assignment]
    if entry.kind == "slots":
        return _hold_slots(found, entry, options, passing)
    parts: dict[str, Make] = {}
    for place in found:
        parts |= _hold_router(place, entry, options, passing)
    return parts


def check_fit(entry: Entry) -> None:
    """Refuse a router that can be no part of a language model.

    Raises:
        UsageError: it is not one.
    """
    why = UNFIT.get(entry.name)
    if entry.kind == "layer":
        why = "It is an architecture of whole layers."
    elif why is None and {"tasks", "modalities"} & set(entry.needs):
        why = "It is told the task or the modality of each token, and a language model is not."
    if why:
        raise UsageError(
            f"The router {entry.name} cannot be put into a model.", why, "`moectl routers` lists what each one needs."
        )


def places(model: nn.Module) -> list[Place]:
    """Where the routers of a model stand, in the order of its layers.

    Raises:
        InputError: there are none, or their choice is handed over in an unknown way.
    """
    found = [_place(model, name, module) for name, module, _ in recorded_routers(model)]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no MoE layers.",
            "A router chooses among the experts of such a layer.",
            "Make a Mixture-of-Experts of it: `moectl upcycle sparse`.",
        )
    return found


def held(model: nn.Module) -> dict[str, Held]:
    """The modules with routers of ours in a model, by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Held)}


def make_router(entry: Entry, hidden_size: int, num_experts: int, options: Any) -> Router:
    """A router of an entry, all of whose buffers are saved: what a model routes by has to be in its checkpoint.

    Raises:
        UsageError: its options make no sense for that many experts.
    """
    try:
        made: Router = entry.load()(hidden_size, num_experts, options)
    except ValueError as error:
        raise UsageError(
            f"The router {entry.name} cannot choose among {num_experts} experts: {error}.",
            "",
            f"Give it other options: {entry.name}:OPTION=VALUE.",
        ) from error
    for module in made.modules():
        module._non_persistent_buffers_set.clear()
    return made


def _hold_router(place: Place, entry: Entry, options: Any, passing: Passing) -> dict[str, Make]:
    """Put a router in the place of a family's, and PEER's neurons in that of its experts.

    Raises:
        UsageError: it sends tokens to other experts than there are.
    """
    parts: dict[str, Make] = {}
    num_experts, path = place.num_experts, place.name.rpartition(".")[0]
    if entry.name == "peer" and place.form == "index":
        experts: Any = place.block.experts
        weights = sum(weight.numel() for weight in experts.parameters())
        num_experts = math.isqrt(weights // (2 * place.hidden_size)) ** 2
        parts[f"{path}.experts"] = partial(Neurons, place.hidden_size, num_experts)
        neurons: Any = parts[f"{path}.experts"]()
        neurons._is_hf_initialized = True
        place.block.experts = neurons
    make = partial(make_router, entry, place.hidden_size, num_experts, options)
    router = make()
    if getattr(router, "reach", num_experts) != num_experts:
        raise UsageError(
            f"The router {entry.name} chooses among more than the {place.num_experts} experts of {escape(place.name)}.",
            "Some of its experts compute nothing, and the family has none such.",
            "`moectl routers` lists others.",
        )
    module = become(place.module, HeldRouter)
    module.form = place.form
    module.hold(router, passing)
    return {**parts, f"{place.name}.router": make}


def _hold_slots(found: list[Place], entry: Entry, options: Any, passing: Passing) -> dict[str, Make]:
    """Make the MoE layers of an encoder soft.

    Raises:
        UsageError: there is no encoder, or none of its layers is a MoE layer.
    """
    parts: dict[str, Make] = {}
    for place in found:
        path = place.name.rpartition(".")[0]
        if "encoder" in path.split("."):
            make = partial(make_router, entry, place.hidden_size, place.num_experts, options)
            block = become(place.block, HeldSlots, kept=("experts",))
            block.form = place.form
            block.hold(make(), passing)
            parts[f"{path}.router"] = make
    if not parts:
        raise UsageError(
            f"The router {entry.name} is for encoders, and this model has no MoE layers in one.",
            "It mixes all tokens of a sequence, so that in a decoder each would know of those that it predicts.",
            "Give an encoder-decoder, such as a Switch Transformer.",
        )
    return parts


def _hold_layers(model: Any, entry: Entry, options: Any, passing: Passing) -> dict[str, Make]:
    """Put a router before every other decoder layer, from the second on, as the paper does."""
    parts: dict[str, Make] = {}
    hidden_size = model.get_input_embeddings().embedding_dim
    for name, layer in list(decoder_layers(model).items())[1::2]:
        make = partial(make_router, entry, hidden_size, 1, options)
        become(layer, HeldLayer, kept=None).hold(make(), passing)
        parts[f"{name}.router"] = make
    model.config.use_cache = False
    return parts


def _place(model: nn.Module, name: str, module: nn.Module) -> Place:
    path = name.rpartition(".")[0]
    block = model.get_submodule(path)
    hidden_size = next((weight.shape[-1] for weight in module.parameters() if weight.ndim == 2), 0)
    found = _shown(module, hidden_size) if isinstance(getattr(block, "experts", None), nn.Module) else None
    if found is None:
        raise InputError(
            f"The router of {escape(path)} ({type(module).__name__}) cannot be replaced.",
            "It hands its choice to the experts in a way of its own.",
            "Give a model of another family: those whose router gives logits, weights and indices.",
        )
    form, num_experts = found
    return Place(name, module, block, form, hidden_size, num_experts)


def _shown(module: nn.Module, hidden_size: int) -> tuple[Form, int] | None:
    """The form of a router's choice and the number of experts, by asking it; None if it is neither known form."""
    weight = next(module.parameters(), None)
    if weight is None or not hidden_size:
        return None
    for shape in ((3,), (1, 3)):
        try:
            with torch.no_grad():
                given = module(torch.zeros(*shape, hidden_size, dtype=weight.dtype, device=weight.device))
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
        if not (isinstance(given, tuple) and len(given) == 3 and all(isinstance(each, Tensor) for each in given)):
            continue
        one, two, three = given
        if not three.is_floating_point() and two.is_floating_point() and two.shape == three.shape == (3, two.shape[-1]):
            return "index", one.shape[-1]
        if not one.is_floating_point() and two.shape == (*shape, 1) and one.shape == three.shape:
            return "mask", one.shape[-1]
    return None
