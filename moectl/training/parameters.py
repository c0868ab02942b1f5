"""Which parameters are trained, and with what learning rate and decay: every one of them has a role."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from torch import nn

from moectl.errors import InputError, UsageError
from moectl.training.routers import BIASES, MoeBlock

Role = Literal["router", "experts", "attention", "other"]

ONLY: dict[str, Callable[[Role], bool]] = {
    "all": lambda _role: True,
    "router": lambda role: role == "router",
    "experts": lambda role: role == "experts",
    "attention+router": lambda role: role in ("attention", "router"),
    "adapters": lambda _role: True,
}
"""What `--only` may say -> which roles are trained; in a model with adapters, which of the adapters'."""

_ROUTER = ("gate.", "router.", "pesc_router.")
_EXPERTS = ("experts.", "pesc_down.", "pesc_up.")

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attn|attention|linear_attn|short_conv|conv)\.")


def role_of(name: str, blocks: Sequence[MoeBlock]) -> Role:
    """The role of the parameter called `name`: routed experts, router, attention (or what stands for it), or other.

    A shared expert is "other": every token goes through it, as through a dense FFN.
    """
    for block in blocks:
        if name.startswith(block.name + "."):
            inside = name.removeprefix(block.name + ".")
            if inside.startswith((*_EXPERTS, *_ROUTER)):
                return "experts" if inside.startswith(_EXPERTS) else "router"
            return "attention" if _ATTENTION.search(inside) else "other"
    return "attention" if _ATTENTION.search(name) else "other"


def check_only(only: str, *, has_adapters: bool) -> None:
    """See that `--only` can be meant.

    Raises:
        UsageError: it is no choice, or adapters of a model that has none, or all of a model whose adapter is written.
    """
    if only not in ONLY:
        raise UsageError(f"--only {only!r} is not known.", "", f"Choose from {', '.join(ONLY)}.")
    if only == "adapters" and not has_adapters:
        raise UsageError(
            "--only adapters: this model has no adapters.",
            "They are trained in a PEFT adapter directory, on the base model it names.",
            "Make one with moectl upcycle pesc MODEL -o ADAPTER, and train ADAPTER.",
        )
    if only == "all" and has_adapters:
        raise UsageError(
            "--only all: the base model of an adapter is frozen.",
            "What is written is the adapter, which cannot hold changes of the base model.",
            "Leave --only out to train the whole adapter, or train the base model itself.",
        )


def select(
    model: nn.Module,
    blocks: Sequence[MoeBlock],
    *,
    only: str,
    freeze_experts: bool,
    adapters: Collection[str] | None = None,
) -> int:
    """Let gradients reach the parameters that are trained and no others; returns how many numbers these are.

    A selection bias is never among them: it has no gradient, and its own rule.

    Args:
        adapters: names of the parameters of an adapter, beside which nothing is trained.

    Raises:
        InputError: nothing is left to train, as with `--only router` in a dense model.
        UsageError: as `check_only`.
    """
    check_only(only, has_adapters=adapters is not None)
    trained = 0
    for name, parameter in model.named_parameters():
        role = role_of(name, blocks)
        wanted = ONLY[only](role) and not (freeze_experts and role == "experts")
        wanted = wanted and (adapters is None or name in adapters)
        parameter.requires_grad_(wanted and not _is_bias(name))
        trained += parameter.numel() * parameter.requires_grad
    if not trained:
        raise InputError(
            f"--only {only} leaves nothing to train in this model.",
            "What is named has no parameters in it, or is frozen."
            if blocks
            else "It is dense: it has neither router nor experts.",
            "Train all of it, or give a Mixture-of-Experts.",
        )
    return trained


def groups(
    model: nn.Module, blocks: Sequence[MoeBlock], *, learning_rate: float, router_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The optimiser's groups: router, experts and the rest, matrices with decay and vectors (norms, biases) without.

    Experts are apart because under expert parallelism they lie on other processes than the rest.
    """
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = role_of(name, blocks)
            key = (role if role in ("router", "experts") else "model", parameter.ndim >= 2)
            found.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": router_rate if role == "router" else learning_rate,
            "weight_decay": weight_decay if matrix else 0.0,
            "name": role,
        }
        for (role, matrix), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


def selection_biases(model: nn.Module) -> set[nn.Parameter]:
    """The selection biases that are parameters: FSDP must leave them whole, since they are updated by hand."""
    return {parameter for name, parameter in model.named_parameters() if _is_bias(name)}


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in BIASES
