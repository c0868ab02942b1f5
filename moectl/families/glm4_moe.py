"""GLM-4.5 (arXiv 2508.06471), its relatives Solar Open and dots.llm1 (arXiv 2506.05767), and what becomes one.

Their routers are sigmoids with a balancing bias per expert; chosen weights are renormalised and their sum is 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moectl.families import decoder
from moectl.families.cohere2_moe import SHARED_EXPERTS
from moectl.families.glm import halves_from_pairs, rotary_dim
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import Config, MoeFamily, Pair, SharedExpert, TensorSpec

SOLAR_OPEN = MoeFamily(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={
        "num_experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "norm_topk": "norm_topk_prob",
        "shared_count": "n_shared_experts",
    },
    values={"output_router_logits": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
    shared=SharedExpert(mlp=SHARED_EXPERTS, default="copy"),
    fewest_experts=2,
    biases=(TensorSpec("model.layers.{layer}.mlp.gate.e_score_correction_bias", ("E",)),),
)
GLM4_MOE = replace(
    SOLAR_OPEN,
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    values={**SOLAR_OPEN.values, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
)
DOTS1 = replace(
    SOLAR_OPEN,
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    values={**SOLAR_OPEN.values, "first_k_dense_replace": 0},
)


def _llama_attention(config: Config) -> dict[str, Any]:
    # glm4_moe rotates half of each head unless told otherwise.
    rope = {"rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 1.0}}
    return {"use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 1.0, **rope}


def _glm_attention(config: Config) -> dict[str, Any]:
    factor = config["rope_parameters"]["partial_rotary_factor"]
    return {"use_qk_norm": False, "attention_bias": config["attention_bias"], "partial_rotary_factor": factor}


def _qwen2_attention(config: Config) -> dict[str, Any]:
    return {**_llama_attention(config), "attention_bias": True}


def _qwen3_attention(config: Config) -> dict[str, Any]:
    return {**_llama_attention(config), "use_qk_norm": True}


def _no_more_than_a_head(config: Config) -> str | None:
    rotary, head_dim = rotary_dim(config), config["head_dim"]
    return f"it rotates {rotary} dimensions of heads of {head_dim}" if rotary > head_dim else None


def _windows(config: Config) -> dict[str, Any]:
    return {name: config[name] for name in ("attention_bias", "layer_types", "sliding_window", "max_window_layers")}


_GLM_ROTARY = {
    f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}": {
        f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}": halves_from_pairs(heads)
    }
    for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in ("weight", "bias")
}

PAIRS = (
    Pair(
        "glm",
        "glm4_moe",
        keep=decoder.KEEP,
        translate=_glm_attention,
        refuse=(_no_more_than_a_head,),
        rewrite=_GLM_ROTARY,
    ),
    Pair("llama", "glm4_moe", keep=decoder.KEEP, translate=_llama_attention, refuse=(decoder.no_biases,)),
    Pair("qwen2", "glm4_moe", keep=decoder.KEEP, translate=_qwen2_attention, refuse=(decoder.no_windows,)),
    Pair(
        "qwen3",
        "glm4_moe",
        keep=decoder.KEEP,
        translate=_qwen3_attention,
        refuse=(decoder.no_windows, decoder.no_biases),
    ),
    Pair("llama", "solar_open", keep=decoder.KEEP, refuse=(decoder.no_biases,)),
    Pair("qwen3", "dots1", keep=decoder.KEEP, translate=_windows),
)
