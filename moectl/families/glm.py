"""GLM-4 (arXiv 2406.12793): half of each head is rotated, in pairs side by side; one matrix for gate and up."""

from __future__ import annotations

from typing import Any

from moectl.checkpoint.expressions import Expression, Index
from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily, FusedMlp, Rewrite


def _end_of_text(config: Config) -> dict[str, Any]:
    return {"eos_token_id": [151329, 151336, 151338]} if config["eos_token_id"] is None else {}


GLM = DenseFamily(
    model_type="glm",
    architecture="GlmForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "rms_norm_eps": 0.00000015625,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 151329,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": True,
    },
    tensors=(*decoder.TENSORS, *decoder.QKV_BIASES),
    mlp=FusedMlp(gate_up="model.layers.{layer}.mlp.gate_up_proj.weight", down=decoder.MLP.down),
    derive=_end_of_text,
    partial_rotary_factor=0.5,
)


def rotary_dim(config: Config) -> int:
    """Dimensions of a head that are rotated: an even number."""
    part = int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"])
    return part + part % 2


def halves_from_pairs(heads: str) -> Rewrite:
    """Rows of q or k in the order of families that rotate dimension i with i + R/2 instead of 2 i with 2 i + 1.

    `heads` is the config field with their number; the scores are sums over a head's dimensions, so order is free.
    """

    def rewrite(x: Expression, config: Config) -> Expression:
        head_dim, rotary = config["head_dim"], rotary_dim(config)
        order = (*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, head_dim))
        return Index(x, 0, tuple(head * head_dim + row for head in range(config[heads]) for row in order))

    return rewrite
