"""The tuner: puts a PescLayer in the place of every FFN, and the load-balancing loss on top of the model's own."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.families.registry import DENSE
from moectl.families.spec import PlainMlp
from moectl.integrations.pesc.balance import Recorder, Routing, switch_loss
from moectl.integrations.pesc.config import PescConfig
from moectl.integrations.pesc.layer import NO_MERGE, PescLayer, hidden_size_of
from moectl.integrations.pesc.lora import add_lora

_MLP_OF_A_LAYER = re.compile(r"(?:.*\.)?\d+\.(\w+)")


class PescModel(BaseTuner):
    """A model with adapter experts behind its FFNs (arXiv 2401.02731); made by `get_peft_model(model, PescConfig())`.

    In training mode, a loss that the model returns holds the load-balancing loss of every layer, each times its
    adapter's `aux_loss_coef`.
    """

    prefix = "pesc_"
    tuner_layer_cls = (PescLayer, LoraLayer)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model in place, as PEFT asks for it, and its LoRA where it has one."""
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self.peft_config[adapter_name]
        if config.lora_r:
            add_lora(model, config, adapter_name, low_cpu_mem_usage)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _pre_injection_hook(self, model: nn.Module, config: PescConfig, adapter_name: str) -> None:
        self.recorder = Recorder()
        self._routings: list[Routing] = []
        self._mask: Tensor | None = None
        # On the model itself, for PEFT calls it past the tuner where a task type is not given.
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _prepare_adapter_config(self, peft_config: PescConfig, model_config: dict[str, Any]) -> PescConfig:
        if peft_config.target_modules is None:
            found = default_targets(model_config.get("model_type"), self.model)
            if not found:
                raise InputError(
                    f"{type(self.model).__name__} has no gated FFN that is found by its name.",
                    "PESC adapters stand behind whole FFNs.",
                    "Name the FFN modules in target_modules, such as ['mlp'].",
                )
            peft_config.target_modules = found
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PescConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, PescLayer):
            layer = PescLayer(target, hidden_size_of(current_key, target), self.recorder)
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config)

    @property
    def routings(self) -> list[Routing]:
        """What each layer's router did in the last forward pass, in order."""
        return self._routings

    def aux_losses(self) -> list[Tensor]:
        """The load-balancing loss of every layer in the last forward pass, in order, unweighted: 1 is even use.

        Padding, as a two-dimensional `attention_mask` has it, does not count.

        Raises:
            InputError: no adapter was at work in the last forward pass, or there was none.
        """
        if not self._routings:
            raise InputError(
                "There is no routing to balance.",
                "No forward pass was made yet, or the adapters were disabled in the last one.",
                "Call the model on a batch first.",
            )
        return [_loss_of(routing, self._mask) for routing in self._routings]

    def get_aux_loss(self) -> Tensor:
        """The sum of `aux_losses`, unweighted, with its gradient to the routers.

        Raises:
            InputError: as `aux_losses`.
        """
        return torch.stack(self.aux_losses()).sum()

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.recorder.routings = []

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._routings, self.recorder.routings = self.recorder.routings or [], None
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        loss = _loss_in(output, kwargs)
        weighted = [(self.peft_config[routing.adapter].aux_loss_coef, routing) for routing in self._routings]
        weighted = [(coefficient, routing) for coefficient, routing in weighted if coefficient]
        if loss is None or not weighted or not model.training:
            return output
        _check_gradients(weighted)
        terms = [coefficient * _loss_of(routing, self._mask).to(loss.device) for coefficient, routing in weighted]
        return _with_loss(output, loss + torch.stack(terms).sum().to(loss.dtype))

    def _check_merge_allowed(self) -> None:
        raise InputError(*NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, self.tuner_layer_cls):
                    setattr(parent, name, child.get_base_layer())
        model = super()._unload_and_optionally_merge(False, *args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model


def default_targets(model_type: str | None, model: nn.Module) -> set[str]:
    """Names of a model's FFN modules: by its family where that is known, else by what their parts are called.

    Empty where there is none: a MoE layer, and an FFN without a gate, are not taken for one.
    """
    family = DENSE.get(model_type or "")
    if family is not None and not isinstance(family.mlp, PlainMlp):
        return {family.mlp.down.split(".")[-3]}
    found = set()
    for name, module in model.named_modules():
        match = _MLP_OF_A_LAYER.fullmatch(name)
        is_gated = (hasattr(module, "gate_proj") and hasattr(module, "up_proj")) or hasattr(module, "gate_up_proj")
        if match and is_gated and hasattr(module, "down_proj") and not hasattr(module, "experts"):
            found.add(match[1])
    return found


def _loss_of(routing: Routing, mask_BL: Tensor | None) -> Tensor:
    mask_T = None
    if mask_BL is not None and mask_BL.numel() == len(routing.logits_TE):
        mask_T = mask_BL.reshape(-1).to(routing.logits_TE.device)
    return switch_loss(routing.logits_TE, routing.index_TK, mask_T)


def _check_gradients(weighted: list[tuple[float, Routing]]) -> None:
    if any(r.is_learning and not r.logits_TE.requires_grad for _, r in weighted) and torch.is_grad_enabled():
        raise InputError(
            "The load-balancing loss has lost its way to the routers.",
            "Reentrant gradient checkpointing runs the layers without gradients.",
            'Give gradient_checkpointing_kwargs={"use_reentrant": False}, or aux_loss_coef=0.',
        )


def _loss_in(output: Any, kwargs: dict[str, Any]) -> Tensor | None:
    if isinstance(output, dict):
        return output.get("loss")
    is_first = isinstance(output, tuple) and kwargs.get("labels") is not None
    return output[0] if is_first else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output
