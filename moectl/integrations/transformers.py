"""`experts_implementation="moectl"` for transformers: import this module once, before a model is loaded.

    import moectl.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="moectl")

Every family whose experts class takes an implementation is served (`moectl families --backend`), on a GPU by Triton
kernels and on a CPU by torch. `model.set_experts_implementation("moectl")` switches a loaded model, and "eager" back.
`pack(model)` makes the experts of a frozen model faster on a CPU.

It also lets checkpoints with coded experts load, those of `moectl compress qmoe`: with `from_pretrained`, as any other,
or with `load`, which refuses a model that is not complete. Such a model runs, saves itself as it was loaded, and cannot
be trained or sharded. Plain weights instead:

    config = AutoConfig.from_pretrained(path)
    config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(path, config=config)

Research checkpoints, whose router is one of moectl's (`moectl train --router`), load in the same two ways.

(Of a `quantization_config=` argument transformers ignores the `dequantize` of methods that are not its own.)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_kernels import expert_mlp
from moe_kernels.ternary import ternary_mlp
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.components import ROUTED
from moectl.integrations.complete import from_pretrained
from moectl.integrations.layout import arguments_of, has_post_norm, up_name
from moectl.integrations.packing import pack, packed_of, refuse_gradients, unpack
from moectl.integrations.qmoe.host import coded_experts
from moectl.integrations.qmoe.quantizer import register as register_coded
from moectl.integrations.routed.config import RoutedConfig

__all__ = ["NAME", "experts_forward", "load", "pack", "unpack"]

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
    post_norm = experts.post_expert_norm if has_post_norm(experts) else None
    said = arguments_of(experts)
    coded = coded_experts(experts)
    if coded is not None:
        del said["transposed"]  # rows of codes are output features, whichever way a family has its weights
        return ternary_mlp(hidden_states, *coded, top_k_index, top_k_weights, post_norm=post_norm, **said)
    up = getattr(experts, up_name(experts))
    return expert_mlp(hidden_states, up, experts.down_proj, top_k_index, top_k_weights, post_norm=post_norm, **said)


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


def load(model: str | os.PathLike[str], revision: str | None = None, **options: Any) -> PreTrainedModel:
    """The language model of a checkpoint, coded or not, with every weight; coded experts run on our kernels.

    Args:
        model: a directory or a Hub id.
        revision: of a Hub id.
        options: of `from_pretrained`. The `dtype` is the checkpoint's own unless it is given.

    Raises:
        InputError: the checkpoint is damaged, or a key is missing, unexpected or of another shape.
        Exception: whatever transformers raises.
    """
    checkpoint = Checkpoint.open(model, revision)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return from_pretrained(auto, checkpoint, **{"dtype": "auto", **options})


ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, fp8_experts_forward)
register_coded()
AutoConfig.register(ROUTED, RoutedConfig)
