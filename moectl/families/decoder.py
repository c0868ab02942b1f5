"""What the Llama-like decoder families have in common: most of their tensors and most of their config."""

from __future__ import annotations

from typing import Any

from moectl.families.spec import Config, GatedMlp, TensorSpec

MLP = GatedMlp(
    gate="model.layers.{layer}.mlp.gate_proj.weight",
    up="model.layers.{layer}.mlp.up_proj.weight",
    down="model.layers.{layer}.mlp.down_proj.weight",
)

TENSORS = (
    TensorSpec("model.embed_tokens.weight", ("V", "H")),
    TensorSpec("model.layers.{layer}.input_layernorm.weight", ("H",)),
    TensorSpec("model.layers.{layer}.self_attn.q_proj.weight", ("Q", "H")),
    TensorSpec("model.layers.{layer}.self_attn.k_proj.weight", ("KV", "H")),
    TensorSpec("model.layers.{layer}.self_attn.v_proj.weight", ("KV", "H")),
    TensorSpec("model.layers.{layer}.self_attn.o_proj.weight", ("H", "Q")),
    TensorSpec("model.layers.{layer}.post_attention_layernorm.weight", ("H",)),
    TensorSpec("model.norm.weight", ("H",)),
    TensorSpec("lm_head.weight", ("V", "H"), when="untied_head"),
)

QKV_BIASES = (
    TensorSpec("model.layers.{layer}.self_attn.q_proj.bias", ("Q",), when="qkv_bias"),
    TensorSpec("model.layers.{layer}.self_attn.k_proj.bias", ("KV",), when="qkv_bias"),
    TensorSpec("model.layers.{layer}.self_attn.v_proj.bias", ("KV",), when="qkv_bias"),
)
O_BIAS = TensorSpec("model.layers.{layer}.self_attn.o_proj.bias", ("H",), when="o_bias")
MLP_BIASES = (
    TensorSpec("model.layers.{layer}.mlp.gate_proj.bias", ("F",), when="mlp_bias"),
    TensorSpec("model.layers.{layer}.mlp.up_proj.bias", ("F",), when="mlp_bias"),
    TensorSpec("model.layers.{layer}.mlp.down_proj.bias", ("H",), when="mlp_bias"),
)
QK_NORMS = (
    TensorSpec("model.layers.{layer}.self_attn.q_norm.weight", ("D",)),
    TensorSpec("model.layers.{layer}.self_attn.k_norm.weight", ("D",)),
)

DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
}

KEEP = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "dtype",
)


def upper_windows(config: Config) -> dict[str, Any]:
    """Qwen's rule: layers from max_window_layers on attend within the sliding window, if windows are used at all."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    kinds = config["layer_types"] or [
        "sliding_attention" if window is not None and layer >= config["max_window_layers"] else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return {"sliding_window": window, "layer_types": kinds}


def no_biases(config: Config) -> str | None:
    """A reason to refuse: biases in attention or FFN."""
    biased = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    return f"{biased[0]} is true, and the MoE family has no biases there" if biased else None


def no_windows(config: Config) -> str | None:
    """A reason to refuse: layers with a sliding window."""
    windows = config["layer_types"].count("sliding_attention")
    return f"{windows} of its layers attend within a sliding window, and the MoE family has none" if windows else None


def no_mlp_bias(config: Config) -> str | None:
    """A reason to refuse: biases in the FFN."""
    return "mlp_bias is true, and experts have no biases" if config.get("mlp_bias") else None


def whole_rotary(config: Config) -> dict[str, Any]:
    """Rotary fields for a family that always rotates whole heads and does not know `partial_rotary_factor`."""
    return {
        name: {key: value for key, value in config[name].items() if key != "partial_rotary_factor"}
        for name in ("rope_parameters", "rope_scaling")
        if name in config
    }
