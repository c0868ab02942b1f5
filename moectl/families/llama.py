"""Llama (arXiv 2302.13971, 2407.21783)."""

from moectl.families import decoder
from moectl.families.spec import DenseFamily

LLAMA = DenseFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES, decoder.O_BIAS, *decoder.MLP_BIASES),
    mlp=decoder.MLP,
)
