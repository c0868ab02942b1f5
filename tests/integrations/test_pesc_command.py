"""`moectl upcycle pesc`: a directory that PEFT loads, made from a config alone, and all that it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from pesc_models import GATED, adapted, config, layers_of, tokens
from safetensors.numpy import load_file

from moectl.errors import InputError, UsageError
from moectl.families.tiny import tiny_model
from moectl.integrations.pesc import PescConfig
from moectl.upcycle.pesc import Base, PescRecipe, plan_pesc

PROGRAM = str(Path(sys.executable).with_name("moectl"))
SMALL = ("--experts", "4", "--adapter-dim", "8")


def moectl(*arguments, code=0):
    done = subprocess.run([PROGRAM, "upcycle", "pesc", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def dense(tmp_path):
    """The config of a tiny Llama, without its weights."""
    tiny_model("llama").config.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_its_directory_loads_with_peft_and_is_the_dense_model_bit_for_bit(dense, tmp_path):
    out = tmp_path / "adapter"
    done = moectl(dense, "-o", out, *SMALL, "--top-k", 3, "--scale", 0.25, "--dropout", 0.1)
    assert done.stdout == f"{out}\n"
    model = PeftModel.from_pretrained(tiny_model("llama"), out)
    assert torch.equal(model(input_ids=tokens()).logits, tiny_model("llama")(tokens()).logits)
    settings = model.peft_config["default"]
    assert (settings.top_k, settings.scale, settings.adapter_dropout) == (3, 0.25, 0.1)
    assert settings.base_model_name_or_path == str(dense)
    for layer in layers_of(model):
        assert not layer.pesc_up["default"].any() and layer.pesc_router["default"].all()
    stated = json.loads((out / "adapter_config.json").read_text())
    assert stated.keys() <= {field.name for field in fields(PescConfig)}


@pytest.mark.parametrize("model_type", GATED)
@pytest.mark.parametrize("rank", [0, 4])
def test_names_and_shapes_are_those_of_the_model_with_an_adapter(model_type, rank, tmp_path):
    model = tiny_model(model_type)
    model.config.save_pretrained(tmp_path)
    plan = plan_pesc(Base.open(str(tmp_path)), PescRecipe(experts=4, adapter_dim=8, lora_rank=rank))
    wanted = get_peft_model_state_dict(get_peft_model(model, config(lora_r=rank)))
    assert {t.name: t.shape for t in plan.tensors} == {name: tuple(tensor.shape) for name, tensor in wanted.items()}


def test_with_lora_it_is_complete_starts_as_peft_does_and_leaves_the_model_as_it_is(dense, tmp_path):
    out = tmp_path / "adapter"
    moectl(dense, "-o", out, *SMALL, "--lora-rank", 8, "--lora-alpha", 32, "--layers", "last:1", "-q")
    model = PeftModel.from_pretrained(tiny_model("llama"), out)
    saved = get_peft_model_state_dict(model)
    written = load_file(out / "adapter_model.safetensors")
    assert saved.keys() == written.keys() and sum("lora_" in name for name in written) == 3 * 2 * 7
    assert all(np.array_equal(saved[name].numpy(), tensor) for name, tensor in written.items())
    assert torch.equal(model(input_ids=tokens()).logits, tiny_model("llama")(tokens()).logits)
    settings = config(lora_r=8, lora_alpha=32, layers_to_transform=[2])
    theirs = get_peft_model_state_dict(get_peft_model(tiny_model("llama"), settings))
    for name, tensor in written.items():
        if "lora_" in name:
            bound = theirs[name].abs().max().item()
            assert np.abs(tensor).max() == pytest.approx(bound, rel=0.05), name
            assert "lora_B" not in name or not tensor.any()
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scales == {4.0}


def test_the_draws_are_uniform_fixed_by_the_seed_and_differ_between_matrices(dense, tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        moectl(dense, "-o", tmp_path / name, "--experts", 16, "--adapter-dim", 32, "--seed", seed, "-q")
        made[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    bound = 64**-0.5
    drawn = [tensor for name, tensor in made["a"].items() if not name.endswith("pesc_up")]
    for tensor in drawn:
        assert np.abs(tensor).max() <= bound < 1.01 * np.abs(tensor).max()
    down = made["a"]["base_model.model.model.layers.0.mlp.pesc_down"]
    assert down.std() == pytest.approx(bound / 3**0.5, rel=0.02) and abs(down.mean()) < 0.01 * bound
    assert len({tensor.tobytes() for tensor in drawn}) == len(drawn)
    for name, tensor in made["a"].items():
        assert np.array_equal(tensor, made["b"][name])
        assert np.array_equal(tensor, made["c"][name]) == name.endswith("pesc_up")


def test_it_follows_the_contract_of_the_other_commands(dense, tmp_path):
    out = tmp_path / "adapter"
    planned = json.loads(moectl(dense, "-o", out, *SMALL, "--dry-run", "--json").stdout)
    assert not out.exists() and planned["files"][0]["name"] == "adapter_model.safetensors"
    made = json.loads(moectl(dense, "-o", out, *SMALL, "--json").stdout)
    assert made["fingerprint"] == planned["fingerprint"] and made["parameters"] == planned["parameters"]
    assert (out / "adapter_model.safetensors").stat().st_size == planned["bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "adapter"}
    quiet = moectl(dense, "-o", out, *SMALL, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (f"{out}\n", "")
    assert "exists" in moectl(dense, "-o", out, *SMALL, "--seed", 1, code=2).stderr
    moectl(dense, "-o", out, *SMALL, "--seed", 1, "--overwrite", "-q")
    assert "in one another" in moectl(dense, "-o", dense, "--overwrite", code=2).stderr


def test_layers_and_type_can_be_chosen(dense, tmp_path):
    moectl(dense, "-o", tmp_path / "adapter", *SMALL, "--layers", "last:1", "--dtype", "bfloat16", "-q")
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert len(layers_of(model)) == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2 * (64 * 4 + 2 * 4 * 8 * 64) + 1000


def test_what_it_refuses(dense, tmp_path):
    refused = moectl(dense, "-o", tmp_path / "x", "--materialize", code=2)
    assert "no MoE family has anything there" in refused.stderr and not refused.stdout
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "moe_model.bin").write_bytes(b"\x80\x04.")
    for given in ("released", "released/moe_model.bin"):
        with pytest.raises(InputError, match="original PESC release") as error:
            Base.open(str(tmp_path / given))
        assert "docs/pesc.md" in error.value.fix
    (tmp_path / "released" / "moe_model.bin").unlink()
    with pytest.raises(InputError, match="has no config"):
        Base.open(str(tmp_path / "released"))
    for model_type in ("mixtral", "t5"):
        tiny_model(model_type).config.save_pretrained(tmp_path / model_type)
        with pytest.raises(InputError, match="no dense family with a gated FFN"):
            Base.open(str(tmp_path / model_type))


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"top_k": 9},
        {"experts": 5000},
        {"adapter_dim": 0},
        {"lora_rank": -1},
        {"lora_alpha": 0},
        {"dropout": 1.0},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"aux_loss_coef": -0.1},
        {"aux_loss_coef": float("nan")},
        {"dtype": "int8"},
    ],
)
def test_a_number_that_cannot_be_meant_is_named(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        PescRecipe(**wrong).check()


def test_the_conversion_of_a_released_checkpoint_does_what_the_page_says(tmp_path):
    """The script in docs/pesc.md, run on a checkpoint laid out as the released code lays it out."""
    page = (Path(__file__).parents[2] / "docs" / "pesc.md").read_text()
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "moe_model.bin" in block]
    wanted = adapted(scale=0.25).eval()
    old = {}
    for index, layer in enumerate(layers_of(wanted)):
        prefix = f"base_model.model.model.layers.{index}.mlp.moe_adapter"
        old[f"{prefix}.router.weight"] = layer.pesc_router["default"].data
        for name in ("down", "up"):
            for expert, matrix in enumerate(getattr(layer, f"pesc_{name}")["default"].data):
                old[f"{prefix}.experts.expert_{expert}.adapter_{name}.weight"] = matrix.clone()
    torch.save(old, tmp_path / "moe_model.bin")
    (tmp_path / "convert.py").write_text(script)
    subprocess.run(
        [sys.executable, "convert.py", "moe_model.bin", "adapter", "base", "2", "0.25"], cwd=tmp_path, check=True
    )
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert torch.equal(model(input_ids=tokens()).logits, wanted(input_ids=tokens()).logits)
