"""T5 (arXiv 1910.10683): an encoder-decoder with FFNs without a gate; v1.1 has gated ones under other names."""

from __future__ import annotations

from typing import Any

from moectl.families.spec import Config, DenseFamily, PlainMlp, TensorSpec

ENCODER, DECODER = "num_hidden_layers", "num_decoder_layers"
"""The fields that count the layers of each stack, once the config is normalised."""


def _attention(stack: str, place: int, name: str, layers: str) -> tuple[TensorSpec, ...]:
    block = f"{stack}.block.{{layer}}.layer.{place}"
    return (
        *(TensorSpec(f"{block}.{name}.{part}.weight", ("Q", "H"), layers=layers) for part in "qkv"),
        TensorSpec(f"{block}.{name}.o.weight", ("H", "Q"), layers=layers),
        TensorSpec(f"{block}.layer_norm.weight", ("H",), layers=layers),
    )


def _position_bias(stack: str) -> TensorSpec:
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return TensorSpec(name, ("relative_attention_num_buckets", "num_attention_heads"))


def _fill_in(config: Config) -> dict[str, Any]:
    """The decoder's depth, and whether what the head reads is scaled: transformers' rules."""
    scaled = config.get("scale_decoder_outputs", config["tie_word_embeddings"] is not False)
    return {DECODER: config[DECODER] or config[ENCODER], "scale_decoder_outputs": bool(scaled)}


T5 = DenseFamily(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "relu",
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
    names={
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    },
    tensors=(
        TensorSpec("shared.weight", ("V", "H")),
        *_attention("encoder", 0, "SelfAttention", ENCODER),
        TensorSpec("encoder.block.{layer}.layer.1.layer_norm.weight", ("H",), layers=ENCODER),
        *_attention("decoder", 0, "SelfAttention", DECODER),
        *_attention("decoder", 1, "EncDecAttention", DECODER),
        TensorSpec("decoder.block.{layer}.layer.2.layer_norm.weight", ("H",), layers=DECODER),
        _position_bias("encoder"),
        _position_bias("decoder"),
        TensorSpec("encoder.final_layer_norm.weight", ("H",)),
        TensorSpec("decoder.final_layer_norm.weight", ("H",)),
    ),
    mlp=PlainMlp(
        up="decoder.block.{layer}.layer.2.DenseReluDense.wi.weight",
        down="decoder.block.{layer}.layer.2.DenseReluDense.wo.weight",
        layers=DECODER,
    ),
    encoder_mlp=PlainMlp(
        up="encoder.block.{layer}.layer.1.DenseReluDense.wi.weight",
        down="encoder.block.{layer}.layer.1.DenseReluDense.wo.weight",
        layers=ENCODER,
    ),
    # Whether they are tied to `shared` is decided by their presence, whatever tie_word_embeddings says.
    optional=tuple(
        TensorSpec(name, ("V", "H"))
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    ),
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    derive=_fill_in,
)
