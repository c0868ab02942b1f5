"""What the Llama-like decoder families have in common: most of their tensors and most of their config."""

from __future__ import annotations

from moectl.families.spec import GatedMlp, TensorSpec

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
