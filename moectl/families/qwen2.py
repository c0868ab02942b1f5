"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k and v; sliding windows chosen per layer."""

from moectl.families import decoder
from moectl.families.spec import DenseFamily

QWEN2 = DenseFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "bos_token_id": None,
        "eos_token_id": None,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES),
    mlp=decoder.MLP,
    derive=decoder.upper_windows,
)
