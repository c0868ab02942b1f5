"""A LoRA adapter merged while the plan is written is the one PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from test_btx import mixed
from test_pairs import logits, relative_error, reload

from moectl.checkpoint.publish import finish
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.workers import parse_worker
from moectl.checkpoint.writer import write
from moectl.errors import InputError
from moectl.families.tiny import tiny_model
from moectl.upcycle.btx import plan_btx
from moectl.upcycle.btx_lora import open_adapter
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def base_model(directory: Path) -> Path:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(directory / "base")
    return directory / "base"


def adapter(base: Path, out: Path, seed: int = 0, **config: Any) -> tuple[Path, Any]:
    """A random adapter saved by PEFT, and the model that PEFT merges it into."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "lora_dropout": 0.1, **config}
    model = get_peft_model(reload(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return out, model.eval().merge_and_unload()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 3}, {"init_lora_weights": "gaussian"}], ids=str)
def test_deltas_are_pefts(config: dict[str, Any], tmp_path: Path) -> None:
    base = base_model(tmp_path)
    lora, merged = adapter(base, tmp_path / "lora", **config)
    moe = mixed([f"{base}+{lora}"] * 2, tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(merged)) <= 1e-5
    assert relative_error(logits(reload(base)), logits(merged)) > 1e-2
    ours, theirs = Checkpoint.open(moe), merged.state_dict()
    expert = ours.read("model.layers.1.block_sparse_moe.experts.1.w2.weight")
    assert np.abs(expert - theirs["model.layers.1.mlp.down_proj.weight"].numpy()).max() <= 1e-6


def test_deltas_on_attention_enter_the_mean(tmp_path: Path) -> None:
    """The expected tensor is W + s B A in float64, averaged with the base's own, rounded once."""
    base = base_model(tmp_path)
    lora, _ = adapter(base, tmp_path / "lora")
    moe = Checkpoint.open(mixed([f"{base}+{lora}", base], tmp_path / "moe"))
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(lora / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.{name[:-7]}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    plain = Checkpoint.open(base).read(name).astype(np.float64)
    expected = (plain + 12 / 4 * b @ a + plain) / 2
    assert np.abs(moe.read(name) - expected).max() <= 1e-7
    assert np.abs(moe.read(name) - plain).max() > 1e-2
    k_proj = name.replace("q_proj", "k_proj")
    assert (moe.read(k_proj) == Checkpoint.open(base).read(k_proj)).all()


def test_workers_and_finish_open_the_adapter_again(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    lora, _ = adapter(base, tmp_path / "lora")
    recipe = BtxRecipe((Expert(f"{base}+{lora}"), Expert(str(base))), shard_bytes=100_000)
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    write(plan_btx(open_models(recipe), recipe, tmp_path / "statistics"), whole)
    for worker in ("1/2", "2/2"):
        plan = plan_btx(open_models(recipe), recipe, tmp_path / "statistics")
        if worker == "2/2":
            with pytest.raises(InputError, match="lacks"):
                finish(shared)
        write(plan, shared, worker=parse_worker(worker, {}))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in shared.iterdir()
    }


def test_another_adapter_is_another_plan(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    lora, _ = adapter(base, tmp_path / "lora")
    recipe = BtxRecipe((Expert(f"{base}+{lora}"), Expert(str(base))))
    before = plan_btx(open_models(recipe), recipe, tmp_path).fingerprint
    assert plan_btx(open_models(recipe), recipe, tmp_path).fingerprint == before
    adapter(base, lora, seed=1)
    assert plan_btx(open_models(recipe), recipe, tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"some_future_field": {"x": 1}}, "some_future_field"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 8}, "r = 8"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": "much"}, "lora_alpha"),
    ],
    ids=str,
)
def test_what_is_not_w_plus_s_b_a_is_refused_by_name(changed: dict[str, Any], word: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    arrays = {f"{at}.lora_A.weight": np.ones((2, 4), "f4"), f"{at}.lora_B.weight": np.ones((4, 2), "f4")}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=word) as caught:
        open_adapter(str(tmp_path))
    assert tmp_path.name in caught.value.what


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"base_model.model.lm_head.weight": (4, 4)}, "lm_head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 4)}, "lora_embedding_A"),
        ({"base_model.model.x.lora_A.weight": (2, 4)}, "no matching A and B"),
        ({"base_model.model.x.lora_A.weight": (2, 4), "base_model.model.x.lora_B.weight": (4, 3)}, "no matching"),
        ({}, "holds no tensors"),
    ],
    ids=str,
)
def test_tensors_that_are_no_lora(arrays: dict[str, tuple[int, ...]], word: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({name: np.ones(shape, "f4") for name, shape in arrays.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=word):
        open_adapter(str(tmp_path))


def test_an_adapter_of_another_model_and_a_pickled_one(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    lora, _ = adapter(base, tmp_path / "lora")
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"lora changes .* but its base model has it as \[32, 96\]"):
        open_models(BtxRecipe((Expert(f"{tmp_path / 'small'}+{lora}"),)))
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        open_adapter(str(lora))
