"""Command R7B and Command A (arXiv 2504.00698): attention and FFN side by side, windows in three layers of four."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily


def _windows(config: Config) -> dict[str, Any]:
    pattern = config.get("sliding_window_pattern") or 4
    layers = range(config["num_hidden_layers"])
    kinds = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in layers]
    return {"layer_types": config["layer_types"] or kinds}


COHERE2 = DenseFamily(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    defaults={
        **{name: value for name, value in decoder.DEFAULTS.items() if name != "rms_norm_eps"},
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
    },
    tensors=(
        *(spec for spec in decoder.TENSORS if "post_attention_layernorm" not in spec.name),
        *decoder.QKV_BIASES,
        decoder.O_BIAS,
    ),
    mlp=decoder.MLP,
    derive=_windows,
)
