"""Tiny random models of a family, for tests and demonstrations. The one file here that needs torch and transformers.

Everything is random, norms and biases too, so that a tensor that is lost or misplaced changes the logits.
"""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
    "t5": {"d_ff": 96, "d_kv": 16, "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "pad_token_id": 0},
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}
"""What some families need beside `SIZES`: their defaults would make a tiny model large or leave a kind of layer out."""


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random language model of `model_type` in float32, `overrides` on top of small sizes.

    It is an `AutoModelForCausalLM`, or `AutoModelForSeq2SeqLM` where the config says so.

    Raises:
        KeyError: transformers does not know the model_type.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = CONFIG_MAPPING[model_type](**{**SIZES, **OWN_SIZES.get(model_type, {}), **overrides})
    torch.manual_seed(seed)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name else 0.0
                parameter.copy_(centre + config.initializer_range * torch.randn_like(parameter))
    return model.eval()
