"""Granite 3 and 4 dense: Llama with four multipliers."""

from moectl.families import decoder
from moectl.families.spec import DenseFamily

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

GRANITE = DenseFamily(
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        **dict.fromkeys(MULTIPLIERS, 1.0),
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES, decoder.O_BIAS, *decoder.MLP_BIASES),
    mlp=decoder.MLP,
)
