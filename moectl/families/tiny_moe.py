"""Tiny random models of the Mixture-of-Experts families of the installed transformers; needs torch and transformers.

A handful of sizes under all the names that configs use for them, and by family only what these leave open. Everything
is random, so that a weight that is lost or misplaced changes the output, and routers choose among all experts.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

EXPERTS = 8

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    # latent attention and its indexer
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention and state space layers
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_dt_rank": 8,
}
"""Each is used where the config knows the name; `OWN_SIZES` has what a family wants otherwise."""

LATENT_ATTENTION: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
"""Latent attention (arXiv 2405.04434): a key per query head, and `head_dim` is the rotary part of a head."""

LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention"]
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]

SLIDING_INKLING: dict[str, Any] = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}

OWN_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR_AND_FULL, "mlp_layer_types": DENSE_THEN_SPARSE},
    "beam": {"mlp_layer_types": DENSE_THEN_SPARSE},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2_text": {"num_key_value_heads": 4, "mlp_layer_types": DENSE_THEN_SPARSE},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "head_dim": 64,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "qk_rope_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 24],
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {
        "layer_types": LINEAR_AND_FULL,
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "hc_mult": 2,
    },
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL},
    "inkling_text": {**SLIDING_INKLING, "n_shared_experts": 1},
    "inkling2_text": SLIDING_INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 16},
    "kimi_linear": {"layer_types": LINEAR_AND_FULL, "mlp_layer_types": DENSE_THEN_SPARSE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 96},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "muse_spark_text": {"moe_hidden_size": 48},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "nllb-moe": {
        "encoder_layers": 2,
        "encoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_layers": 2,
        "decoder_ffn_dim": 96,
        "decoder_attention_heads": 4,
        "decoder_sparse_step": 2,
        "init_std": 0.15,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    },
    "qwen3_5_moe_text": {"layer_types": LINEAR_AND_FULL},
    "qwen3_next": {"layer_types": LINEAR_AND_FULL},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "layer_types": LINEAR_AND_FULL,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p5": {"mlp_layer_types": DENSE_THEN_SPARSE, "share_expert_dim": 32, "sliding_window": 8, "pad_token_id": 0},
    "switch_transformers": {
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_heads": 4,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "pad_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What some families need beside `SIZES`: their defaults make a tiny model large, or leave a kind of layer out."""

PARTS: dict[str, tuple[str, ...]] = {
    "nllb_moe": ("nllb-moe",),
    "qwen3_omni_moe": ("qwen3_omni_moe_text", "qwen3_omni_moe_talker_text"),
    "step3p7": ("step3p5",),
}
"""Families whose configs with experts are not called like the family, nor like the family and "_text"."""

EMBEDDED = ("qwen3_omni_moe_talker_text",)
"""Models that are fed embeddings, not ids."""

HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "TextModel", "Model")
"""Which of the classes made for one config is the model, best first."""


def tiny_moe(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of `model_type` in float32 and evaluation mode, `overrides` on top of small sizes.

    `model_type` is that of a text config where a family has several ("qwen3_vl_moe_text"). The model has a language
    head where the family has one for that config, and else returns hidden states.

    Raises:
        KeyError: the installed transformers does not know the model_type.
    """
    import torch

    config_class = _config_class(model_type)
    alias = config_class.attribute_map
    known = {*inspect.signature(config_class).parameters, *config_class().to_dict(), *alias}
    sizes = {name: value for name, value in SIZES.items() if name in known and alias.get(name) not in SIZES}
    if {"kv_lora_rank", "qk_rope_head_dim"} <= known:
        sizes |= LATENT_ATTENTION
    config = config_class(**sizes | deepcopy(OWN_SIZES.get(model_type, {})) | overrides)
    torch.manual_seed(seed)
    with _memory_of_nan():
        model = _model_class(config_class)(config)
    randomise(model)
    return model.eval()


def model_types(family: str) -> tuple[str, ...]:
    """The model_type (mostly one) under which `tiny_moe` builds the experts of a family, named as its folder is."""
    if family in PARTS:
        return PARTS[family]
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    text = f"{family}_text"
    return (text if any(getattr(c, "model_type", "") == text for c in vars(module).values()) else family,)


def tiny_inputs(model: Any, batch: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a forward pass of a tiny model: random ids, the same into encoder and decoder."""
    import torch

    ids = torch.randint(3, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))
    if model.config.model_type in EMBEDDED:
        return {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def randomise(model: Any) -> None:
    """Replace what an initialisation leaves constant or out: norms, biases, selection biases, tables of experts.

    A selection bias is small against the differences between scores, or it would choose the same experts for all.
    """
    import torch

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            constant = tensor.ndim == 1 or tensor.min() == tensor.max() or tensor.isnan().any()
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint_like(tensor, EXPERTS))
            elif constant and (isinstance(tensor, torch.nn.Parameter) or name.endswith("bias")):
                centre = 1.0 if "norm" in name else 0.0
                spread = 0.02 if name.endswith(("correction_bias", "expert_bias")) else SIZES["initializer_range"]
                tensor.copy_(centre + spread * torch.randn_like(tensor))


@contextmanager
def _memory_of_nan() -> Iterator[None]:
    """Let `torch.empty` give NaN (integers: their largest value), so that what nobody initialises can be told."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _config_class(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    import transformers.models

    # Configs of parts of a model are not all in the mapping; their module is the longest family name they begin with.
    families = [name for name in dir(transformers.models) if model_type.startswith(name + "_")]
    for family in sorted(families, key=len)[-1:]:
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        for member in vars(module).values():
            if inspect.isclass(member) and getattr(member, "model_type", "") == model_type:
                return member
    raise KeyError(model_type)


def _model_class(config_class: Any) -> Any:
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    made_for_it = [
        c
        for name, c in vars(module).items()
        if inspect.isclass(c) and getattr(c, "config_class", None) is config_class and "PreTrained" not in name
    ]
    return next(c for head in HEADS for c in made_for_it if c.__name__.endswith(head))
