"""LFM2 and LFM2-MoE (arXiv 2511.23404) and the pair between them: short convolutions and attention, layer by layer."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily, GatedMlp, MoeFamily, Pair, TensorSpec

_LAYER = "model.layers.{layer}."


def _attention(name: str, *shape: str) -> TensorSpec:
    return TensorSpec(f"{_LAYER}self_attn.{name}", shape, kind="full_attention")


def _convolution(name: str, *shape: str, when: str | None = None) -> TensorSpec:
    return TensorSpec(f"{_LAYER}conv.{name}", shape, when=when, kind="conv")


def _width_and_layers(config: Config) -> dict[str, Any]:
    """The FFN's real width (two thirds of the stated one, rounded up, unless switched off), and old spellings."""
    width = config.get("block_ff_dim") or config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        if config["block_ffn_dim_multiplier"] is not None:
            multiple = config["block_multiple_of"]
            width = -(-int(config["block_ffn_dim_multiplier"] * width) // multiple) * multiple
    layers = range(config["num_hidden_layers"])
    full = set(layers if config["full_attn_idxs"] is None else config["full_attn_idxs"])
    kinds = ["full_attention" if layer in full else "conv" for layer in layers]
    return {
        "intermediate_size": width,
        "layer_types": config["layer_types"] or kinds,
        "tie_word_embeddings": config.get("tie_embedding", config["tie_word_embeddings"]),
    }


LFM2 = DenseFamily(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    defaults={
        "max_position_embeddings": 128_000,
        "num_key_value_heads": 8,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": None,
        "layer_types": None,
    },
    tensors=(
        TensorSpec("model.embed_tokens.weight", ("V", "H")),
        TensorSpec(f"{_LAYER}operator_norm.weight", ("H",)),
        _convolution("conv.weight", "H", "1", "conv_L_cache"),
        _convolution("in_proj.weight", "3H", "H"),
        _convolution("out_proj.weight", "H", "H"),
        _convolution("conv.bias", "H", when="conv_bias"),
        _convolution("in_proj.bias", "3H", when="conv_bias"),
        _convolution("out_proj.bias", "H", when="conv_bias"),
        _attention("q_proj.weight", "Q", "H"),
        _attention("k_proj.weight", "KV", "H"),
        _attention("v_proj.weight", "KV", "H"),
        _attention("out_proj.weight", "H", "Q"),
        _attention("q_layernorm.weight", "D"),
        _attention("k_layernorm.weight", "D"),
        TensorSpec(f"{_LAYER}ffn_norm.weight", ("H",)),
        TensorSpec("model.embedding_norm.weight", ("H",)),
        TensorSpec("lm_head.weight", ("V", "H"), when="untied_head"),
    ),
    mlp=GatedMlp(
        gate=f"{_LAYER}feed_forward.w1.weight",
        up=f"{_LAYER}feed_forward.w3.weight",
        down=f"{_LAYER}feed_forward.w2.weight",
    ),
    derive=_width_and_layers,
    rope_theta=1_000_000.0,
)
LFM2_MOE = MoeFamily(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    router=f"{_LAYER}feed_forward.gate.weight",
    mlp=GatedMlp(
        gate=f"{_LAYER}feed_forward.experts.{{expert}}.w1.weight",
        up=f"{_LAYER}feed_forward.experts.{{expert}}.w3.weight",
        down=f"{_LAYER}feed_forward.experts.{{expert}}.w2.weight",
    ),
    fields={
        "num_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "norm_topk": "norm_topk_prob",
    },
    values={
        "output_router_logits": False,
        "num_dense_layers": 0,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
    },
    biases=(TensorSpec(f"{_LAYER}feed_forward.expert_bias", ("E",)),),
)

PAIRS = (Pair("lfm2", "lfm2_moe", keep=(*decoder.KEEP, "norm_eps", "conv_bias", "conv_L_cache", "layer_types")),)
