"""Mixtral (arXiv 2401.04088) and what becomes one. Its top-k weights are always renormalised."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
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


def _no_mlp_bias(config: Config) -> str | None:
    return "mlp_bias is true, and mixtral's experts have no biases" if config.get("mlp_bias") else None


def _window(config: Config) -> dict[str, Any]:
    return {"sliding_window": config["sliding_window"]}


PAIRS = (
    Pair("llama", "mixtral", keep=decoder.KEEP, translate=_window, refuse=(_no_attention_bias, _no_mlp_bias)),
    Pair("mistral", "mixtral", keep=decoder.KEEP, translate=_window),
)
