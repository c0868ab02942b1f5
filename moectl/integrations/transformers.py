"""`experts_implementation="moectl"` for transformers: import this module once, before a model is loaded.

    import moectl.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="moectl")

Every family whose experts class takes an implementation is served (`moectl families --backend`), on a GPU by Triton
kernels and on a CPU by torch. `model.set_experts_implementation("moectl")` switches a loaded model, and "eager" back.
`pack(model)` makes the experts of a frozen model faster on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_kernels import expert_mlp
from moectl.errors import InputError
from moectl.integrations.layout import arguments_of, has_post_norm, up_name
from moectl.integrations.packing import pack, packed_of, refuse_gradients, unpack

__all__ = ["NAME", "experts_forward", "pack", "unpack"]

NAME = "moectl"


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer: [T, D] with choices and weights [T, K] -> [T, D], differentiable but for the choices.

    Under expert parallelism ids are this rank's, and one >= `experts.num_experts` is another rank's and adds nothing.
    The product is in the type of the weights, or in autocast's where they are float32, and the result in that of
    `hidden_states`.

    Raises:
        InputError: the experts are packed and a gradient is asked for.
    """
    packed = packed_of(experts)
    if packed is not None:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            refuse_gradients()
        return packed.forward(hidden_states, top_k_index, top_k_weights)
    return expert_mlp(
        hidden_states,
        getattr(experts, up_name(experts)),
        experts.down_proj,
        top_k_index,
        top_k_weights,
        post_norm=experts.post_expert_norm if has_post_norm(experts) else None,
        **arguments_of(experts),
    )


def fp8_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Refuse experts whose weights are stored in 8 bits.

    Raises:
        InputError: always.
    """
    raise InputError(
        f'experts_implementation="{NAME}" has no kernels for the FP8 experts of this checkpoint.',
        "Their weights are 8-bit numbers with a scale per block.",
        'Load it with experts_implementation="grouped_mm", or dequantised: '
        "quantization_config=FineGrainedFP8Config(dequantize=True).",
    )


ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, fp8_experts_forward)
