"""Mixtral (arXiv 2401.04088) and what becomes one. Its top-k weights are always renormalised."""

from __future__ import annotations

from typing import Any

from moectl.checkpoint.expressions import Expression, Slice
from moectl.families import decoder
from moectl.families.phi3 import QKV
from moectl.families.spec import Config, GatedMlp, MoeFamily, Pair

MIXTRAL = MoeFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    mlp=GatedMlp(
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    ),
    fields={
        "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "intermediate_size",
        "aux_loss": "router_aux_loss_coef",
    },
    values={"output_router_logits": False, "router_jitter_noise": 0.0},
)


def _no_attention_bias(config: Config) -> str | None:
    return "attention_bias is true, and mixtral's attention has no biases" if config.get("attention_bias") else None


def _whole_heads_rotate(config: Config) -> str | None:
    factor = config["rope_parameters"]["partial_rotary_factor"]
    return f"partial_rotary_factor is {factor:g}, and mixtral rotates whole heads" if factor != 1 else None


def _window(config: Config) -> dict[str, Any]:
    return {"sliding_window": config["sliding_window"]}


def _phi3_attention(config: Config) -> dict[str, Any]:
    return decoder.whole_rotary(config) | _window(config)


def _q(x: Expression, config: Config) -> Expression:
    return Slice(x, 0, 0, config["num_attention_heads"] * config["head_dim"])


def _k(x: Expression, config: Config) -> Expression:
    start = config["num_attention_heads"] * config["head_dim"]
    return Slice(x, 0, start, start + config["num_key_value_heads"] * config["head_dim"])


def _v(x: Expression, config: Config) -> Expression:
    start = (config["num_attention_heads"] + config["num_key_value_heads"]) * config["head_dim"]
    return Slice(x, 0, start, start + config["num_key_value_heads"] * config["head_dim"])


_QKV = {
    QKV: {
        f"model.layers.{{layer}}.self_attn.{part}_proj.weight": rewrite
        for part, rewrite in (("q", _q), ("k", _k), ("v", _v))
    }
}


PAIRS = (
    Pair("llama", "mixtral", keep=decoder.KEEP, translate=_window, refuse=(_no_attention_bias, decoder.no_mlp_bias)),
    Pair("mistral", "mixtral", keep=decoder.KEEP, translate=_window),
    Pair(
        "phi3",
        "mixtral",
        keep=decoder.KEEP,
        translate=_phi3_attention,
        refuse=(_whole_heads_rotate,),
        rewrite=_QKV,
    ),
)
