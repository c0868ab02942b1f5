"""ERNIE 4.5 MoE and what becomes one."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.cohere2_moe import SHARED_EXPERTS
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import Config, MoeFamily, Pair, SharedExpert, TensorSpec

ERNIE4_5_MOE = MoeFamily(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={
        "num_experts": "moe_num_experts",
        "top_k": "moe_k",
        "expert_width": "moe_intermediate_size",
        "aux_loss": "router_aux_loss_coef",
        "shared_count": "moe_num_shared_experts",
    },
    values={
        "output_router_logits": False,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "use_bias": False,
    },
    shared=SharedExpert(mlp=SHARED_EXPERTS, default="none"),
    biases=(TensorSpec("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias", ("1", "E")),),
)


def _to_the_last_layer(config: Config) -> dict[str, Any]:
    return {"moe_layer_end_index": config["num_hidden_layers"] - 1}


def _no_use_bias(config: Config) -> str | None:
    return "use_bias is true, and ernie4_5_moe's experts have no biases" if config["use_bias"] else None


PAIRS = (Pair("ernie4_5", "ernie4_5_moe", keep=decoder.KEEP, translate=_to_the_last_layer, refuse=(_no_use_bias,)),)
