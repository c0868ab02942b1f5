"""Qwen3-MoE (arXiv 2505.09388) and what becomes one. Its attention is the same in every layer."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import Config, MoeFamily, Pair

QWEN3_MOE = MoeFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={meaning: field for meaning, field in QWEN2_MOE.fields.items() if meaning != "shared_width"},
    values=QWEN2_MOE.values,
    dense_layers="mlp_only_layers",
)


def _attention(config: Config) -> dict[str, Any]:
    windows = "sliding_attention" in config["layer_types"]
    return {
        "attention_bias": config["attention_bias"],
        "use_sliding_window": windows,
        "sliding_window": config["sliding_window"] if windows else None,
    }


def _no_mixed_layers(config: Config) -> str | None:
    kinds = sorted(set(config["layer_types"]))
    return f"its layers mix {' and '.join(kinds)}, and qwen3_moe has one kind" if len(kinds) > 1 else None


PAIRS = (Pair("qwen3", "qwen3_moe", keep=decoder.KEEP, translate=_attention, refuse=(_no_mixed_layers,)),)
