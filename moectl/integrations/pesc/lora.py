"""LoRA on the linear layers beside the adapters (arXiv 2106.09685), made by PEFT and kept under the same name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from moectl.integrations.pesc.config import PescConfig
from moectl.integrations.pesc.layer import PescLayer


def add_lora(model: nn.Module, config: PescConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
    """Put PEFT's LoRA layers on the linear layers that `config` names, those inside the FFNs too.

    Raises:
        ValueError: none of its target modules is there.
    """
    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(targets) if isinstance(targets, set) else targets,
        layers_to_transform=None if targets == "all-linear" else config.layers_to_transform,
    )
    with _unwrapped(model):
        inject_adapter_in_model(lora, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Inside, the FFNs stand in their own places and the model has no `peft_config`.

    PEFT never looks for targets inside another tuner's layer, and would take our dictionary of configs for its own.
    """
    configs = model.__dict__.pop("peft_config", None)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PescLayer)
    ]
    for parent, name, child in places:
        setattr(parent, name, child.base_layer)
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        model.__dict__.pop("peft_config", None)
        if configs is not None:
            model.__dict__["peft_config"] = configs
