"""What an experts module of transformers says about itself, in the terms of `moe_kernels.expert_mlp`.

Everything is worked out at each call from plain attributes, and only the activation is remembered, by value: weights
may be offloaded, wrapped by PEFT or swapped between two calls, so nothing here holds a tensor or a module.
An experts module is of any class decorated with `use_experts_implementation`, hence typed as Any.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moe_kernels import Activation
from moectl.families.backend import GATES, Gate

_NAMES = {
    "silu": ("silu", 1.0),
    "swish": ("silu", 1.0),
    "quick_gelu": ("silu", 1.702),
    "gelu": ("gelu", 1.0),
    "gelu_pytorch_tanh": ("gelu_tanh", 1.0),
    "gelu_new": ("gelu_tanh", 1.0),
    "gelu_fast": ("gelu_tanh", 1.0),
    "gelu_accurate": ("gelu_tanh", 1.0),
    "relu": ("relu", 1.0),
    "relu2": ("relu2", 1.0),
    "linear": ("identity", 1.0),
}

KNOWN: dict[Any, tuple[str, float]] = {type(ACT2FN[name]): said for name, said in _NAMES.items()} | {
    functional.silu: ("silu", 1.0),
    functional.relu: ("relu", 1.0),
}
"""A class of activation module, or a function, without parameters -> `kind` and `alpha` of the Activation it is."""


def arguments_of(module: Any) -> dict[str, Any]:
    """The keyword arguments of `expert_mlp` that describe an experts module, all but its norm."""
    activation = activation_of(module) or (module._apply_gate if module.has_gate else module.act_fn)
    return {
        "activation": activation,
        "gate_up_bias": getattr(module, up_name(module) + "_bias") if module.has_bias else None,
        "down_bias": module.down_proj_bias if module.has_bias else None,
        "interleaved": not module.is_concatenated,
        "transposed": module.is_transposed,
    }


def up_name(module: Any) -> str:
    """What the up-projection is called."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def has_post_norm(module: Any) -> bool:
    """Whether the experts' outputs go through `post_expert_norm`; transformers before 5.20 has no such experts."""
    return vars(module).get("has_post_expert_norm", False)


def activation_of(module: Any) -> Activation | None:
    """The activation of an experts module, or None where only its own method computes it.

    None too for whatever is not surely known: a method replaced on the instance, an activation with parameters, a class
    from outside transformers, and gate and up rows that alternate under the default gate, which splits halves.
    """
    method = type(module)._apply_gate
    if not module.has_gate:
        return _activation(_marker(module), False, None, None, 0.0)
    if "_apply_gate" in vars(module):
        return None
    if method is _default_apply_gate:
        return _activation(_marker(module), True, None, None, 0.0) if module.is_concatenated else None
    gate = _gate_of(type(module), method)
    if gate is None:
        return None
    limit = getattr(module, gate.limit) if gate.limit else None
    alpha = getattr(module, gate.alpha) if gate.alpha else None
    return _activation(_marker(module) if gate.act_fn else functional.silu, True, limit, alpha, gate.offset)


def _gate_of(experts_class: type, method: Any) -> Gate | None:
    """The row of `GATES` for the class of transformers that defines the method."""
    for owner in experts_class.__mro__:
        if owner.__name__ in GATES and owner.__module__.startswith("transformers.models."):
            return GATES[owner.__name__] if owner._apply_gate is method else None  # type: ignore[attr-defined]
    return None


def _marker(module: Any) -> Any:
    """What tells one `act_fn` from another: the class of a module, or the function itself; None where there is none."""
    # Looked up where a module is kept: asking the module for it costs a microsecond more.
    function = module._modules.get("act_fn")
    return getattr(module, "act_fn", None) if function is None else type(function)


def _make(marker: Any, gated: bool, limit: float | None, alpha: float | None, offset: float) -> Activation | None:
    if marker not in KNOWN:
        return None
    kind, slope = KNOWN[marker]
    return Activation(kind, gated, limit, slope if alpha is None else alpha, offset)


_remembered = cache(_make)


def _activation(*said: Any) -> Activation | None:
    # A compiler traces through, and would only warn about, the cache.
    return _make(*said) if torch.compiler.is_compiling() else _remembered(*said)
