"""Which part of a model a tensor belongs to, by its name, for architectures named as most of the Hub is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

COMPONENTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embedding", re.compile(r"embed_tokens|word_embeddings?\b|\bwte\b|embed_in|\bshared\.weight$")),
    ("head", re.compile(r"lm_head|embed_out|\boutput\.weight$")),
    ("shared experts", re.compile(r"shared_expert|shared_mlp|shared_head\.mlp")),
    ("router", re.compile(r"router|\bgate\.(wg\.)?(weight|bias)$|e_score_correction_bias|expert_bias")),
    ("experts", re.compile(r"(?<!pre_)(?<!post_)experts?[._]|\b(block_sparse_moe|mlp)\.(input|output)_linear")),
    ("norms", re.compile(r"norm|\bln_\w+|layer_?norm", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|SelfAttention|EncDecAttention|\bconv\b|linear_attn|mamba|mixer")),
    ("dense FFN", re.compile(r"mlp|feed_forward|ffn|DenseReluDense|dense_h_to_4h|\bfc[12]\b")),
)
"""Component -> pattern; the first that matches counts, `other` when none does."""

PER_EXPERT = re.compile(r"(?P<block>.*\bexperts)\.(?:expert_)?(?P<expert>\d+)\.(?P<matrix>.+)")
"""A tensor of one expert: `model.layers.3.mlp.experts.17.up_proj.weight`."""

FUSED_EXPERTS = re.compile(r"(?P<block>.*\bexperts)\.(?P<matrix>(gate_up|gate|up|down)_proj(\.weight)?)")
"""A 3-D tensor of all experts of a layer: `model.layers.3.mlp.experts.gate_up_proj`."""

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "num_selected_experts",
    "top_k_experts",
)
_FIXED_TOP_K = {"nllb-moe": 2, "switch_transformers": 1}
ROUTED = "moectl_routed"
"""The `model_type` of research checkpoints, whose config names one of our routers."""

_BESIDE = ("mod", "soft-moe")
"""Routers beside which those of the family stay."""


def component(name: str) -> str:
    """The component a tensor belongs to."""
    return next((label for label, pattern in COMPONENTS if pattern.search(name)), "other")


def experts_and_top_k(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The number of routed experts and of those active per token, wherever the config keeps them; None if nowhere."""
    places = within(config)
    router = config.get("router")  # of a research checkpoint
    if isinstance(router, Mapping) and router.get("name") not in _BESIDE:
        options = router.get("options")
        places = [{_TOP_K[0]: options.get("top_k") if isinstance(options, Mapping) else None}, *places]

    def first(names: tuple[str, ...]) -> int | None:
        values = (place.get(name) for place in places for name in names)
        return next((value for value in values if type(value) is int and value > 0), None)

    top_k = next((_FIXED_TOP_K[kind] for place in places if (kind := place.get("model_type")) in _FIXED_TOP_K), None)
    return first(_NUM_EXPERTS), top_k or first(_TOP_K)


def within(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The places of a config.json where a field may stand: itself, and configs inside it, of text, a base or FFNs."""
    inside = (config.get(name) for name in ("text_config", "base_config", "ffn_config"))
    return [config, *(place for place in inside if isinstance(place, Mapping))]
