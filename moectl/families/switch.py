"""Switch Transformers (arXiv 2101.03961), and T5 that becomes one: the pair of the first sparse upcycling.

A token goes to one expert, whose output is multiplied by its probability, so equal experts give the dense FFN only if
that probability is known: a router of zeros makes it 1/E, and `wo` times E makes up for it.
"""

from __future__ import annotations

from typing import Any

from moectl.families.spec import Config, MoeFamily, Pair, PlainMlp
from moectl.families.t5 import DECODER, ENCODER

CAPACITY = 1 << 20
"""Tokens of a sequence an expert takes before it drops the rest, written as expert_capacity.

A router of zeros sends every token to expert 0, so it has to hold the longest sequence, for which T5's relative
positions set no limit. transformers only compares with it: a large one costs no memory. Its own default of 64 drops
what comes after: measured on 160 tokens, logits off by half of the largest.
"""


def _experts(block: str, layers: str) -> PlainMlp:
    return PlainMlp(
        f"{block}.mlp.experts.expert_{{expert}}.wi.weight", f"{block}.mlp.experts.expert_{{expert}}.wo.weight", layers
    )


_ENCODER_BLOCK = "encoder.block.{layer}.layer.1"
_DECODER_BLOCK = "decoder.block.{layer}.layer.2"

SWITCH_TRANSFORMERS = MoeFamily(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    router=f"{_DECODER_BLOCK}.mlp.router.classifier.weight",
    mlp=_experts(_DECODER_BLOCK, DECODER),
    encoder=(f"{_ENCODER_BLOCK}.mlp.router.classifier.weight", _experts(_ENCODER_BLOCK, ENCODER)),
    fields={
        "num_experts": "num_experts",
        "expert_width": "d_ff",
        "aux_loss": "router_aux_loss_coef",
        "sparse_encoder": "num_sparse_encoder_layers",
        "sparse_decoder": "num_sparse_decoder_layers",
    },
    values={
        "is_encoder_decoder": True,
        "expert_capacity": CAPACITY,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
    },
    router_std=0.0,
)


def _renamed(config: Config) -> dict[str, Any]:
    # Switch scales what the head reads if and only if the head is tied; T5 states the two apart.
    return {
        "d_model": config["hidden_size"],
        "d_kv": config["head_dim"],
        "num_layers": config[ENCODER],
        "num_decoder_layers": config[DECODER],
        "num_heads": config["num_attention_heads"],
        "dense_act_fn": config["feed_forward_proj"],
        "tie_word_embeddings": config["scale_decoder_outputs"],
    }


def _gated(config: Config) -> str | None:
    kind = config["feed_forward_proj"]
    if config.get("is_gated_act") or kind.startswith("gated"):
        return f"feed_forward_proj is {kind} (T5 v1.1), and switch_transformers has no place for a gate"
    if config.get("dense_act_fn", kind) != kind:
        return "dense_act_fn and feed_forward_proj name different activations"
    return None


PAIRS = (
    Pair(
        "t5",
        "switch_transformers",
        keep=(
            "vocab_size",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "dropout_rate",
            "layer_norm_epsilon",
            "initializer_factor",
            "use_cache",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "decoder_start_token_id",
        ),
        translate=_renamed,
        refuse=(_gated,),
    ),
)
