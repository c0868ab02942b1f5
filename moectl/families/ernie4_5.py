"""ERNIE 4.5 dense: Llama with rotary pairs side by side, as its MoE sibling has them."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily


def _biases(config: Config) -> dict[str, Any]:
    return {"attention_bias": bool(config["use_bias"]), "mlp_bias": bool(config["use_bias"])}


ERNIE4_5 = DenseFamily(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    defaults={
        **{name: value for name, value in decoder.DEFAULTS.items() if name != "attention_dropout"},
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES, decoder.O_BIAS, *decoder.MLP_BIASES),
    mlp=decoder.MLP,
    derive=_biases,
    rope_theta=500_000.0,
)
