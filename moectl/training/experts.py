"""The experts implementation `moectl-train`: our kernels, with weights cast as autocast casts those of linear maps.

Under autocast the masters are float32 and products are bfloat16; a 3-D weight handed to a kernel of ours is seen by
none of autocast's rules, and would be multiplied in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from moe_kernels import expert_mlp
from moectl.integrations.layout import arguments_of, has_post_norm, up_name

NAME = "moectl-train"


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer, [T, D] -> [T, D], in autocast's type where it is on."""
    kind = hidden_states.device.type
    arguments = arguments_of(experts)
    tensors = {
        "gate_up": getattr(experts, up_name(experts)),
        "down": experts.down_proj,
        "gate_up_bias": arguments.pop("gate_up_bias"),
        "down_bias": arguments.pop("down_bias"),
    }
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_states = hidden_states.to(dtype)
        tensors = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    return expert_mlp(
        hidden_states,
        tensors.pop("gate_up"),
        tensors.pop("down"),
        top_k_index,
        top_k_weights,
        post_norm=experts.post_expert_norm if has_post_norm(experts) else None,
        **tensors,
        **arguments,
    )


ExpertsInterface.register(NAME, experts_forward)
