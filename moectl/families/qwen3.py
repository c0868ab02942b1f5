"""Qwen3 (arXiv 2505.09388): norms on q and k instead of biases, a head size of its own."""

from moectl.families import decoder
from moectl.families.spec import DenseFamily

QWEN3 = DenseFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES, decoder.O_BIAS, *decoder.QK_NORMS),
    mlp=decoder.MLP,
    derive=decoder.upper_windows,
)
