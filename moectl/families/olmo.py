"""OLMo 2 (arXiv 2501.00656) and OLMo 3: norms after attention and FFN, and over all heads of q and of k at once."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily, TensorSpec

_DEFAULTS = {
    **decoder.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "attention_bias": False,
}
_TENSORS = (
    *(spec for spec in decoder.TENSORS if "input_layernorm" not in spec.name),
    *decoder.QKV_BIASES,
    decoder.O_BIAS,
    TensorSpec("model.layers.{layer}.self_attn.q_norm.weight", ("Q",)),
    TensorSpec("model.layers.{layer}.self_attn.k_norm.weight", ("KV",)),
    TensorSpec("model.layers.{layer}.post_feedforward_layernorm.weight", ("H",)),
)


def _every_fourth_full(config: Config) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    kinds = ["full_attention" if (layer + 1) % 4 == 0 else "sliding_attention" for layer in layers]
    return {"layer_types": config["layer_types"] or kinds}


OLMO2 = DenseFamily(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults=_DEFAULTS,
    tensors=_TENSORS,
    mlp=decoder.MLP,
)
OLMO3 = DenseFamily(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**_DEFAULTS, "sliding_window": 4096, "layer_types": None},
    tensors=_TENSORS,
    mlp=decoder.MLP,
    derive=_every_fourth_full,
    rope_theta=500_000.0,
)
