"""Frozen experts for inference on a CPU: weights in the order in which oneDNN reads them, in place of the originals.

With few rows per expert, as in generation, a product mostly waits for its weights to be reordered; packed ones are.
A packed model has no expert weights that others can see, so saving it is refused until it is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import Activation
from moe_kernels.cpu import PackedExperts
from moe_kernels.cpu import pack as pack_weights
from moectl.errors import InputError
from moectl.integrations.layout import arguments_of, has_post_norm, up_name

PACKED = "_moectl_packed"
"""The attribute of an experts module that holds its packed weights."""

_UNPACK = "Call moectl.integrations.transformers.unpack(model) first."


def pack(model: nn.Module) -> int:
    """Replace the experts' weights of `model` by packed ones, layer by layer, so that only one layer is held twice.

    The model must run with `experts_implementation="moectl"`. Experts that are packed already stay as they are.

    Returns:
        The bytes that all packed weights take.

    Raises:
        InputError: the model is in training mode, an expert's weight requires a gradient, is not on a CPU or of a type
            that oneDNN cannot pack here, or the experts' outputs have a norm of their own.
    """
    modules = _experts(model)
    for name, module in modules.items():
        if PACKED not in vars(module):
            _check(name, module)
    for name, module in modules.items():
        if PACKED not in vars(module):
            _pack_module(name, module)
    return sum(vars(module)[PACKED].nbytes for module in modules.values())


def unpack(model: nn.Module) -> None:
    """Give the packed experts of `model` their parameters back, bit for bit, frozen as they were."""
    for module in _experts(model).values():
        packed = vars(module).pop(PACKED, None)
        if packed is not None:
            vars(module).pop(PACKED + "_hook").remove()
            for name, projection in ((up_name(module), packed.up), ("down_proj", packed.down)):
                module.register_parameter(name, _restored(projection, module.is_transposed))


def refuse_gradients() -> None:
    """Say that a packed layer has no backward.

    Raises:
        InputError: always.
    """
    raise InputError("The experts of this model are packed for inference.", "They have no gradients.", _UNPACK)


def _experts(model: nn.Module) -> dict[str, Any]:
    found = {name: module for name, module in model.named_modules() if "is_concatenated" in vars(module)}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no experts that moectl runs.",
            "Only the families that `moectl families --backend` lists as covered have.",
        )
    return found


def _check(name: str, module: Any) -> None:
    problem, fix = "", ""
    weights = [getattr(module, up_name(module)), module.down_proj]
    if not all(isinstance(weight, Tensor) for weight in weights):
        problem, fix = "are coded", 'They run as they are stored: load the model with experts_implementation="moectl".'
    elif module.training:
        problem, fix = "are in training mode", "Call model.eval() first."
    elif any(weight.requires_grad for weight in weights):
        problem, fix = "require gradients", "Call model.requires_grad_(False) first."
    elif any(weight.device.type != "cpu" for weight in weights):
        problem, fix = f"are on {weights[0].device}", "Packing is for a CPU: move the model there first."
    elif has_post_norm(module):
        problem, fix = "have a norm after the down-projection", "Leave this family unpacked."
    if problem:
        raise InputError(f"The experts in {name} {problem}, so they cannot be packed.", "", fix)


def _pack_module(name: str, module: Any) -> None:
    up, said = up_name(module), arguments_of(module)
    if not isinstance(said["activation"], Activation):
        said["activation"] = _of_rows(said["activation"])
    try:
        packed = pack_weights(getattr(module, up), module.down_proj, **said)
    except ValueError as error:
        raise InputError(f"The experts in {name} cannot be packed.", str(error)) from error
    delattr(module, up)
    del module.down_proj
    setattr(module, PACKED, packed)
    setattr(module, PACKED + "_hook", module.register_state_dict_pre_hook(_refuse_state_dict))


def _of_rows(method: Callable[[Tensor], Tensor]) -> Callable[[Tensor, bool], Tensor]:
    """A module's own method, called as an Activation is: it knows itself whether its rows are interleaved."""
    return lambda rows, interleaved: method(rows)


def _refuse_state_dict(module: Any, prefix: str, keep_vars: bool) -> None:
    raise InputError(f"The weights of {prefix.rstrip('.')} are packed, so a checkpoint would lack them.", "", _UNPACK)


def _restored(projection: Any, transposed: bool) -> nn.Parameter:
    weight = torch.stack([matrix.to_dense() for matrix in projection.packed])
    return nn.Parameter(weight.mT.contiguous() if transposed else weight, requires_grad=False)


def packed_of(module: Any) -> PackedExperts | None:
    """The packed weights of an experts module, None where it is not packed."""
    return vars(module).get(PACKED)
