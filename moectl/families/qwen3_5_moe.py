"""Qwen3.5-MoE's text model and what becomes one. It always has a gated shared expert, and its weights sum to 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moectl.families import decoder
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.qwen3_5 import LINEAR
from moectl.families.spec import Config, MoeFamily, Pair

assert QWEN2_MOE.shared is not None

QWEN3_5_MOE = MoeFamily(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={meaning: field for meaning, field in QWEN2_MOE.fields.items() if meaning != "norm_topk"},
    values={"output_router_logits": False},
    shared=replace(QWEN2_MOE.shared, default="copy"),
)


def _partial_rotary(config: Config) -> dict[str, Any]:
    return {"partial_rotary_factor": config["rope_parameters"]["partial_rotary_factor"]}


_KEEP = (*decoder.KEEP, *LINEAR, "attention_bias", "layer_types")
PAIRS = (Pair("qwen3_5_text", "qwen3_5_moe_text", keep=_KEEP, translate=_partial_rotary),)
