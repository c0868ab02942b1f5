"""Tiny models with PESC adapters, and the paper's formula as loops over tokens in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from moectl.families.registry import DENSE
from moectl.families.spec import PlainMlp
from moectl.families.tiny import tiny_model
from moectl.integrations.pesc import PescConfig, PescLayer

EXPERTS, WIDTH = 4, 8
GATED = [name for name, family in DENSE.items() if not isinstance(family.mlp, PlainMlp)]


def tokens(rows: int = 2, length: int = 13, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def config(**changes: Any) -> PescConfig:
    return PescConfig(**{"task_type": "CAUSAL_LM", "num_experts": EXPERTS, "top_k": 2, "adapter_dim": WIDTH, **changes})


def adapted(model_type: str = "llama", *, trained: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A tiny model with an adapter; `trained` gives W_up values, so that everything counts."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(model_type), config(**changes))
    return randomised(model, seed) if trained else model


def randomised(model: Any, seed: int = 0, name: str = "default") -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            for parameter in (layer.pesc_router[name], layer.pesc_down[name], layer.pesc_up[name]):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def layers_of(model: nn.Module) -> list[PescLayer]:
    return [module for module in model.modules() if isinstance(module, PescLayer)]


def formula(
    x: Tensor, y: Tensor, router: Tensor, down: Tensor, up: Tensor, top_k: int, scale: float, planted: str = ""
) -> Tensor:
    """y + sum_j w_j s W_up_j gelu(W_down_j y), w = softmax of the top k of W_r x: a loop over tokens and choices."""
    rows = []
    for x_D, y_D in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True):
        logits = router @ (y_D if planted == "router on the output" else x_D)
        values, chosen = logits.topk(top_k)
        weights = logits.softmax(0)[chosen] if planted == "softmax before top-k" else values.softmax(0)
        read = x_D if planted == "adapter on the input" else y_D
        total = y_D
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            total = total + weight * scale * (up[expert] @ functional.gelu(down[expert] @ read))
        rows.append(total)
    return torch.stack(rows).view(y.shape)


class Reference:
    """The dense model in float64 with the formula hooked behind its FFNs; weights are leaves named as in PEFT."""

    def __init__(self, model: Any, planted: str = "") -> None:
        settings = model.peft_config["default"]
        self.dense = tiny_model(model.config.model_type).double().requires_grad_(False)
        self.weights: dict[str, Tensor] = {}
        for index, (layer, mine) in enumerate(zip(layers_of(model), ffns(self.dense), strict=True)):
            parts = {
                name: getattr(layer, f"pesc_{name}")["default"].detach().double().requires_grad_()
                for name in ("router", "down", "up")
            }
            self.weights |= {f"{index}.{name}": weight for name, weight in parts.items()}
            mine.register_forward_hook(self._hook(parts, settings, planted))

    @staticmethod
    def _hook(parts: dict[str, Tensor], settings: PescConfig, planted: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return formula(inputs[0], y, **parts, top_k=settings.top_k, scale=settings.scale, planted=planted)

        return hook


def ffns(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith((".mlp", ".feed_forward"))]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest wanted magnitude."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def twin(model: Any) -> Any:
    return copy.deepcopy(model)
