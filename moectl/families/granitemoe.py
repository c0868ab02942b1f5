"""Granite-MoE, with a shared expert (GraniteMoeShared), or among mamba layers (GraniteMoeHybrid), and what becomes one.

Their experts are stored as one 3-D tensor, and the hybrid's layers are all made attention.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from moectl.checkpoint.expressions import Expression, Literal
from moectl.families import decoder
from moectl.families.granite import MULTIPLIERS
from moectl.families.spec import Config, FusedMlp, MoeFamily, Pair, SharedExpert

GRANITEMOE = MoeFamily(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    router="model.layers.{layer}.block_sparse_moe.router.layer.weight",
    mlp=FusedMlp(
        gate_up="model.layers.{layer}.block_sparse_moe.input_linear.weight",
        down="model.layers.{layer}.block_sparse_moe.output_linear.weight",
    ),
    fields={
        "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "intermediate_size",
        "aux_loss": "router_aux_loss_coef",
    },
    values={"output_router_logits": False},
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    fields={**GRANITEMOE.fields, "shared_width": "shared_intermediate_size"},
    shared=SharedExpert(
        mlp=FusedMlp(
            gate_up="model.layers.{layer}.shared_mlp.input_linear.weight",
            down="model.layers.{layer}.shared_mlp.output_linear.weight",
        ),
        default="copy",
    ),
)
GRANITEMOEHYBRID = replace(
    GRANITEMOESHARED,
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    values={**GRANITEMOE.values, "position_embedding_type": "rope"},
)


def _all_attention(config: Config) -> dict[str, Any]:
    # The config class checks the sizes of mamba layers though there are none: 128 heads have to divide 2 H.
    return {
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "mamba_n_heads": math.gcd(128, 2 * config["hidden_size"]),
    }


def _llama_multipliers(config: Config) -> dict[str, Any]:
    return {**dict.fromkeys(MULTIPLIERS, 1.0), "attention_multiplier": config["head_dim"] ** -0.5}


def _qwen2_attention(config: Config) -> dict[str, Any]:
    return {**_llama_multipliers(config), "attention_bias": True}


def _as_it_is(x: Expression, _config: Config) -> Expression:
    return x


def _zeros(_x: Expression, config: Config) -> Expression:
    return Literal((config["hidden_size"],), 0.0)


_O_PROJ = "model.layers.{layer}.self_attn.o_proj"
_WITH_O_BIAS = {f"{_O_PROJ}.weight": {f"{_O_PROJ}.weight": _as_it_is, f"{_O_PROJ}.bias": _zeros}}
_KEEP = (*decoder.KEEP, "attention_bias")
_GRANITE_KEEP = (*_KEEP, *MULTIPLIERS)
_REFUSE = (decoder.no_mlp_bias,)

PAIRS = (
    Pair("granite", "granitemoe", keep=_GRANITE_KEEP, refuse=_REFUSE),
    Pair("granite", "granitemoeshared", keep=_GRANITE_KEEP, refuse=_REFUSE),
    Pair("granite", "granitemoehybrid", keep=_GRANITE_KEEP, translate=_all_attention, refuse=_REFUSE),
    Pair("llama", "granitemoe", keep=_KEEP, translate=_llama_multipliers, refuse=_REFUSE),
    Pair(
        "qwen2",
        "granitemoe",
        keep=decoder.KEEP,
        translate=_qwen2_attention,
        refuse=(decoder.no_windows,),
        rewrite=_WITH_O_BIAS,
    ),
)
