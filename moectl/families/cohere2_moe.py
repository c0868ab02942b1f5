"""Cohere2-MoE and what becomes one. Its weights are a softmax over the chosen logits, so they sum to 1."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import Config, GatedMlp, MoeFamily, Pair, SharedExpert

SHARED_EXPERTS = GatedMlp(
    gate="model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
    up="model.layers.{layer}.mlp.shared_experts.up_proj.weight",
    down="model.layers.{layer}.mlp.shared_experts.down_proj.weight",
)

COHERE2_MOE = MoeFamily(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={
        "num_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "intermediate_size",
        "norm_topk": "norm_topk_prob",
        "shared_count": "num_shared_experts",
    },
    values={
        "output_router_logits": False,
        "rms_norm_eps": None,
        "expert_selection_fn": "softmax",
        "shared_expert_combination_strategy": "sum",
    },
    shared=SharedExpert(mlp=SHARED_EXPERTS, default="none"),
)


def _all_moe(config: Config) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse"] * config["num_hidden_layers"]}


_KEEP = (*decoder.KEEP, "layer_norm_eps", "logit_scale", "attention_bias", "sliding_window", "layer_types")
PAIRS = (Pair("cohere2", "cohere2_moe", keep=_KEEP, translate=_all_moe),)
