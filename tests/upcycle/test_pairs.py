"""Every pair computes the dense model's function, loads without a gap, and stays per-expert when saved again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.families.registry import MOE, PAIRS
from moectl.families.tiny import tiny_model
from moectl.upcycle.sparse import SparseRecipe, plan_sparse

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "linear rope": {"rope_parameters": LINEAR},
    "odd eps and activation": {"rms_norm_eps": 3e-3, "hidden_act": "gelu"},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"head size": {"head_dim": 32}, "one kv head": {"num_key_value_heads": 1}},
    "mistral": {"window": {"sliding_window": 16}, "no window": {"sliding_window": None}},
    "qwen2": {
        "window on upper layers": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "window on all": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "explicit layer types": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
    "qwen3": {
        "attention bias and head size": {"attention_bias": True, "head_dim": 32},
        "window on all": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    },
}
CASES = [
    pytest.param(pair.dense, pair.moe, overrides, id=f"{pair.dense}->{pair.moe}: {name}")
    for pair in PAIRS
    for name, overrides in {**COMMON, **OWN[pair.dense]}.items()
]
LENGTH = 48


def logits(model: Any) -> torch.Tensor:
    """Logits of fixed random ids, longer than any window used here."""
    ids = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def reload(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def upcycled(dense: Path, out: Path, **recipe: Any) -> Path:
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(**{"experts": 4, **recipe})), out)
    return out


@pytest.mark.parametrize(("dense_type", "moe_type", "overrides"), CASES)
def test_moe_equals_dense(dense_type: str, moe_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    if dense_type == "qwen3":
        overrides = {"head_dim": 16, **overrides}
    dense = tiny_model(dense_type, **overrides)
    dense.save_pretrained(tmp_path / "dense")
    model = reload(upcycled(tmp_path / "dense", tmp_path / "moe", into=moe_type, shard_bytes=200_000))
    assert model.config.model_type == moe_type
    assert relative_error(logits(model), logits(dense)) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    first = Checkpoint.open(tmp_path / "moe")
    assert {name: ref.shape for name, ref in again.tensors.items()} == {
        name: ref.shape for name, ref in first.tensors.items()
    }
    expert = re.compile(re.escape(MOE[moe_type].mlp.down).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"))
    assert sum(bool(expert.fullmatch(name)) for name in again.tensors) == 3 * 4


@pytest.mark.parametrize("spoil", ["sliding_window", "rope_theta", "norm_topk_prob"])
def test_the_tolerance_can_fail(spoil: str, tmp_path: Path) -> None:
    """The errors this kind of conversion makes in practice are far above the tolerance."""
    dense = tiny_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    config = json.loads((moe / "config.json").read_text())
    match spoil:
        case "sliding_window":
            config |= {"layer_types": ["full_attention"] * 3}
        case "rope_theta":
            config |= {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
        case "norm_topk_prob":
            config |= {"norm_topk_prob": False}
    (moe / "config.json").write_text(json.dumps(config))
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-3


@pytest.mark.parametrize("dense_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_configs_that_leave_everything_to_defaults(dense_type: str, tmp_path: Path) -> None:
    """Hub configs written by hand or by old versions say little; the defaults of the dense family still hold."""
    dense = tiny_model(dense_type, rope_parameters={"rope_type": "default", "rope_theta": 30000.0}, head_dim=16)
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    needed = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    kept = {name: config[name] for name in (*needed, *heads)} | {"rope_theta": 30000.0, "torch_dtype": "float32"}
    if dense_type == "qwen3":
        kept["head_dim"] = 16
    path.write_text(json.dumps(kept))
    stripped = reload(tmp_path / "dense")
    moe = reload(upcycled(tmp_path / "dense", tmp_path / "moe"))
    assert relative_error(logits(moe), logits(stripped)) <= 1e-5
    assert moe.config.max_position_embeddings == stripped.config.max_position_embeddings


def test_legacy_rope_scaling_is_kept(tmp_path: Path) -> None:
    dense = tiny_model("llama", rope_parameters=YARN)
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps({**config, "rope_scaling": rope}))
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5
    written = json.loads((moe / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 4.0 and written["rope_theta"] == 20000.0


def test_a_tied_head_that_is_stored_goes_along(tmp_path: Path) -> None:
    dense = tiny_model("llama", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5


def test_sixteen_bit_sources_and_casts(tmp_path: Path) -> None:
    """A bf16 source is copied bit for bit; a cast output loads and is close to what the cast dense model says."""
    tiny_model("qwen3", head_dim=16).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    moe = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "moe"))
    source = Checkpoint.open(tmp_path / "dense")
    name = "model.layers.1.mlp.{}down_proj.weight"
    for expert in range(4):
        assert (moe.read(name.format(f"experts.{expert}.")) == source.read(name.format(""))).all()
    assert moe.config["dtype"] == "bfloat16"
    expected = logits(reload(tmp_path / "dense"))
    assert relative_error(logits(reload(moe.path)), expected) <= 1e-5
    cast = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "cast", dtype="float32"))
    assert {ref.dtype for ref in cast.tensors.values()} == {"F32"}
    assert relative_error(logits(reload(cast.path)), expected) <= 1e-5
