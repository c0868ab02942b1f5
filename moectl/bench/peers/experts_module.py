"""An experts module of transformers around given weights, for each of its experts implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer


def layer(weights: Weights, implementation: str, copied: Callable[[int], int] = lambda _tokens: 0) -> Layer:
    """Qwen3-MoE's experts, the plain kind that 60 of transformers' families share, with `implementation` chosen."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = weights.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    train = weights.gate_up_EGD.requires_grad
    experts.gate_up_proj = nn.Parameter(weights.gate_up_EGD.detach(), requires_grad=train)
    experts.down_proj = nn.Parameter(weights.down_EDF.detach(), requires_grad=train)
    return Layer(experts, (experts.gate_up_proj, experts.down_proj), copied=copied)
