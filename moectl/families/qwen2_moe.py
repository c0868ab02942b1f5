"""Qwen2-MoE (arXiv 2407.10671, section 2.2.2) and what becomes one. It always has a shared expert."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, GatedMlp, MoeFamily, Pair, SharedExpert

QWEN2_MOE = MoeFamily(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    router="model.layers.{layer}.mlp.gate.weight",
    mlp=GatedMlp(
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    ),
    fields={
        "num_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "norm_topk": "norm_topk_prob",
        "aux_loss": "router_aux_loss_coef",
        "shared_width": "shared_expert_intermediate_size",
    },
    values={"output_router_logits": False, "decoder_sparse_step": 1},
    dense_layers="mlp_only_layers",
    shared=SharedExpert(
        mlp=GatedMlp(
            gate="model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
            up="model.layers.{layer}.mlp.shared_expert.up_proj.weight",
            down="model.layers.{layer}.mlp.shared_expert.down_proj.weight",
        ),
        default="silent",
        gate_row="model.layers.{layer}.mlp.shared_expert_gate.weight",
    ),
)


def _attention(config: Config) -> dict[str, Any]:
    # The two families derive layer_types from the same fields by different rules, so it is always written out.
    windows = "sliding_attention" in config["layer_types"]
    return {
        "qkv_bias": True,
        "use_sliding_window": windows,
        "sliding_window": config["sliding_window"],
        "layer_types": config["layer_types"],
    }


def _llama_attention(config: Config) -> dict[str, Any]:
    return {
        "qkv_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
    }


PAIRS = (
    Pair("qwen2", "qwen2_moe", keep=(*decoder.KEEP, "max_window_layers"), translate=_attention),
    Pair("llama", "qwen2_moe", keep=decoder.KEEP, translate=_llama_attention, refuse=(decoder.no_biases,)),
)
