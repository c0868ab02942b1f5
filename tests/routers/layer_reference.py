"""What the layers are held to: numpy in float64, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import erf, softmax
from torch import nn

from moectl.routers.moa import Moa, MoaOptions

Array = np.ndarray


def seeded(made: Callable[[], nn.Module]) -> nn.Module:
    """A module in float64 whose parameters, norms included, are all drawn."""
    torch.manual_seed(0)
    module = made().double()
    with torch.no_grad():
        for parameter in module.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.normal_()
    return module


def router(hidden_size: int, num_experts: int, top_k: int = 2) -> Moa:
    """Top-k of a softmax, not renormalised."""
    return Moa(hidden_size, num_experts, MoaOptions(top_k=top_k, normalize=False))


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def layer_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * gain + bias


def routed(row: Array, gate_ED: Array, experts: Sequence[Callable[[Array], Array]], top_k: int = 2) -> Array:
    """sum over the top-k of p_e expert_e(row)."""
    probability = softmax(gate_ED @ row)
    return sum(probability[e] * experts[e](row) for e in np.argsort(-probability)[:top_k])


def feed_forward(up_EFD: Array, down_EDF: Array) -> list[Callable[[Array], Array]]:
    return [lambda row, up=up, down=down: down @ gelu(up @ row) for up, down in zip(up_EFD, down_EDF, strict=True)]


def attended(query_LD: Array, key_LD: Array, value_LD: Array, num_heads: int, causal: bool) -> Array:
    """One sequence, position by position and head by head."""
    L, D = query_LD.shape
    width, y_LD = D // num_heads, np.zeros((L, D))
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(L):
            last = t + 1 if causal else L
            score = [query_LD[t, part] @ key_LD[s, part] / np.sqrt(width) for s in range(last)]
            y_LD[t, part] = softmax(np.array(score)) @ value_LD[:last, part]
    return y_LD
