"""Mistral 7B (arXiv 2310.06825): Llama with a sliding attention window."""

from moectl.families import decoder
from moectl.families.spec import DenseFamily

MISTRAL = DenseFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    tensors=decoder.TENSORS,
    mlp=decoder.MLP,
)
