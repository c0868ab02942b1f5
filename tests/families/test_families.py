"""Families are data: their defaults are transformers' own, and what a pair cannot hold is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from trees import dense_llama

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.families.components import component, experts_and_top_k
from moectl.families.config import normalised
from moectl.families.registry import DENSE, MOE, PAIRS
from moectl.families.releases import RECORDS, is_older
from moectl.families.shapes import expected_tensors
from moectl.families.tiny import SIZES, tiny_model
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

OURS_ALONE = {"qkv_bias", "sliding_window", "tie_word_embeddings"}
"""Defaults that say what a family always has, or never has, though its config class has no such field."""


@pytest.mark.parametrize("model_type", DENSE)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config.json that leaves a field out means what transformers assumes, today and after an upgrade."""
    theirs = CONFIG_MAPPING[model_type]
    for name, value in DENSE[model_type].defaults.items():
        if name in OURS_ALONE and not hasattr(theirs, name):
            continue
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True}])
def test_expected_tensors_are_those_of_transformers(model_type: str, options: dict[str, Any]) -> None:
    model = tiny_model(model_type, **options)
    config = normalised(DENSE[model_type], model.config.to_dict())
    found = dict(expected_tensors(DENSE[model_type], config))
    head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    head |= {spec.name for spec in DENSE[model_type].optional}
    assert found == {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in head}


@pytest.mark.parametrize("model_type", MOE)
def test_moe_families_name_fields_that_exist(model_type: str) -> None:
    family = MOE[model_type]
    config = CONFIG_MAPPING[model_type](**SIZES)
    newer = {"output_router_logits"} if is_older(RECORDS) else set()
    fields = {*family.fields.values(), *family.values} - newer
    assert [name for name in fields if not hasattr(config, name)] == []
    assert config.architectures is None and CONFIG_MAPPING[model_type].model_type == model_type


def test_pairs_are_between_known_families() -> None:
    assert all(pair.dense in DENSE and pair.moe in MOE for pair in PAIRS)
    assert {(pair.dense, pair.moe) for pair in PAIRS} >= {
        ("llama", "mixtral"),
        ("mistral", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("qwen3", "qwen3_moe"),
    }


def with_config(path: Path, **changes: Any) -> Checkpoint:
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "lacks tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"num_hidden_layers": 3}, "lacks tensor 'model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, "holds tensor 'model.layers.1.input_layernorm.weight', which is no part"),
        ({"num_hidden_layers": 90_000}, "num_hidden_layers is 90000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"hidden_size": "big"}, "hidden_size = 'big'"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"hidden_size": ...}, "hidden_size = None"),
        ({"intermediate_size": 49}, "of shape [48, 32], expected [49, 32] by its config"),
        ({"vocab_size": 65}, "tensor 'model.embed_tokens.weight' of shape [64, 32], expected [65, 32]"),
        ({"num_key_value_heads": 4}, "k_proj.weight' of shape [16, 32], expected [32, 32]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be upcycled"),
    ],
)
def test_config_and_weights_must_agree(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_sparse(with_config(dense_llama(tmp_path / "m"), **changes), SparseRecipe())
    assert message in caught.value.what and caught.value.fix


def test_what_mixtral_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    for option, reason in (("attention_bias", "attention has no biases"), ("mlp_bias", "experts have no biases")):
        source = Checkpoint.open(dense_llama(tmp_path / option, **{option: True}))
        with pytest.raises(InputError, match=reason):
            plan_sparse(source, SparseRecipe())


def test_mixed_attention_does_not_become_qwen3_moe(tmp_path: Path) -> None:
    tiny_model("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="mix full_attention and sliding_attention"):
        plan_sparse(Checkpoint.open(tmp_path / "m"), SparseRecipe())


def test_old_rotary_buffers_are_left_behind(tmp_path: Path) -> None:
    from files import random_array, safetensors_bytes

    path = dense_llama(tmp_path / "m")
    source = Checkpoint.open(path)
    arrays = {name: source.read(name) for name in source.tensors}
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    (path / "model.safetensors").write_bytes(safetensors_bytes({**arrays, buffer: random_array((4,))}))
    assert buffer not in {tensor.name for tensor in plan_sparse(Checkpoint.open(path), SparseRecipe()).tensors}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"experts": 1}, "--top-k 2 of --experts 1"),
        ({"top_k": 0}, "--top-k 0"),
        ({"router_std": -1.0}, "--router-std -1.0"),
        ({"noise": float("nan")}, "--noise nan"),
        ({"dtype": "int8"}, "--dtype 'int8' is not known"),
        ({"dtype": "float64"}, "--dtype 'float64' is not known"),
        ({"shard_bytes": 0}, "below one byte"),
        ({"into": "qwen3_moe"}, "llama cannot become 'qwen3_moe'"),
    ],
)
def test_impossible_recipes_are_usage_errors(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_sparse(Checkpoint.open(dense_llama(tmp_path / "m")), SparseRecipe(**recipe))
    assert message in caught.value.what and caught.value.fix


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "shared experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "dense FFN"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.bias", "attention"),
        ("model.embed_tokens.weight", "embedding"),
        ("decoder.block.1.layer.1.EncDecAttention.q.weight", "attention"),
        ("decoder.block.1.layer.2.mlp.experts.expert_3.wi.weight", "experts"),
        ("lm_head.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_components_by_name(name: str, part: str) -> None:
    assert component(name) == part


def test_inspection_counts_what_transformers_counts(tmp_path: Path) -> None:
    from moectl.evaluation.inspect import inspect

    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1)
    model.save_pretrained(tmp_path / "m")
    found = inspect(Checkpoint.open(tmp_path / "m"))
    experts = 3 * 4 * 3 * 64 * 96
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.active_parameters == found.parameters - experts * 3 // 4
    assert experts_and_top_k({"text_config": {"n_routed_experts": 6, "num_experts_per_tok": 2}}) == (6, 2)


@pytest.mark.parametrize("into", [pair.moe for pair in PAIRS if pair.dense == "llama"])
def test_a_rope_scaling_of_null_is_none(into: str, tmp_path: Path) -> None:
    """Most configs on the Hub say so."""
    plan = plan_sparse(Checkpoint.open(dense_llama(tmp_path / "m", rope_scaling=None)), SparseRecipe(into=into))
    assert "rope_scaling" not in plan.config
