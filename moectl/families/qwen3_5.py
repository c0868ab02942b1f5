"""Qwen3.5's text model: gated linear attention in three layers of four, gated full attention in the fourth."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily, TensorSpec

LINEAR = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_LAYER = "model.layers.{layer}."


def _attention(name: str, *shape: str, when: str | None = None) -> TensorSpec:
    return TensorSpec(f"{_LAYER}self_attn.{name}", shape, when=when, kind="full_attention")


def _linear(name: str, *shape: str) -> TensorSpec:
    return TensorSpec(f"{_LAYER}linear_attn.{name}", shape, kind="linear_attention")


def _layers_and_widths(config: Config) -> dict[str, Any]:
    interval = config.get("full_attention_interval") or 4
    layers = range(config["num_hidden_layers"])
    kinds = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in layers]
    return {
        "layer_types": config["layer_types"] or kinds,
        "linear_keys": config["linear_num_key_heads"] * config["linear_key_head_dim"],
        "linear_values": config["linear_num_value_heads"] * config["linear_value_head_dim"],
    }


QWEN3_5 = DenseFamily(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": False,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "layer_types": None,
    },
    tensors=(
        *(spec for spec in decoder.TENSORS if "self_attn" not in spec.name),
        _attention("q_proj.weight", "2Q", "H"),
        _attention("k_proj.weight", "KV", "H"),
        _attention("v_proj.weight", "KV", "H"),
        _attention("o_proj.weight", "H", "Q"),
        _attention("q_proj.bias", "2Q", when="qkv_bias"),
        _attention("k_proj.bias", "KV", when="qkv_bias"),
        _attention("v_proj.bias", "KV", when="qkv_bias"),
        _attention("o_proj.bias", "H", when="o_bias"),
        _attention("q_norm.weight", "D"),
        _attention("k_norm.weight", "D"),
        _linear("in_proj_qkv.weight", "2linear_keys+linear_values", "H"),
        _linear("in_proj_z.weight", "linear_values", "H"),
        _linear("in_proj_a.weight", "linear_num_value_heads", "H"),
        _linear("in_proj_b.weight", "linear_num_value_heads", "H"),
        _linear("conv1d.weight", "2linear_keys+linear_values", "1", "linear_conv_kernel_dim"),
        _linear("A_log", "linear_num_value_heads"),
        _linear("dt_bias", "linear_num_value_heads"),
        _linear("norm.weight", "linear_value_head_dim"),
        _linear("out_proj.weight", "H", "linear_values"),
    ),
    mlp=decoder.MLP,
    derive=_layers_and_widths,
    partial_rotary_factor=0.25,
)
