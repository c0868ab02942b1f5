"""Branch-Train-MiX: equal models give the dense model, and different ones exactly the mixture of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from files import random_array
from safetensors.numpy import save_file
from test_pairs import logits, relative_error, reload
from transformers import MixtralConfig, MixtralForCausalLM
from trees import arrays_equal, dense_llama

from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.families.tiny import tiny_model
from moectl.upcycle.btx import plan_btx
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert

PAIRS = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe", "olmo2": "flex_olmo"}
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm")


def mixed(experts: list[Any], out: Path, **recipe: Any) -> Path:
    """The written mixture of some checkpoints."""
    members = tuple(each if isinstance(each, Expert) else Expert(str(each)) for each in experts)
    asked = BtxRecipe(members, **recipe)
    write(plan_btx(open_models(asked), asked, out.with_name(f"{out.name}.statistics")), out)
    return out


def branches(directory: Path, number: int = 3, dtype: str = "bfloat16", **config: Any) -> list[Path]:
    """Random Llamas of one shape and no relation: everything in them differs."""
    paths = []
    for branch in range(number):
        path = dense_llama(directory / f"branch{branch}", **config)
        tensors = Checkpoint.open(path).tensors
        arrays = {
            name: random_array(ref.shape, dtype, 100 * branch + i) for i, (name, ref) in enumerate(tensors.items())
        }
        save_file(arrays, path / "model.safetensors", {"format": "pt"})
        paths.append(path)
    return paths


@pytest.mark.parametrize(("dense_type", "moe_type"), PAIRS.items())
def test_equal_experts_are_the_dense_model(dense_type: str, moe_type: str, tmp_path: Path) -> None:
    dense = tiny_model(dense_type)
    dense.save_pretrained(tmp_path / "dense")
    moe = mixed([tmp_path / "dense"] * 3, tmp_path / "moe", include_seed=Expert(str(tmp_path / "dense")))
    model = reload(moe)
    assert model.config.model_type == moe_type
    assert relative_error(logits(model), logits(dense)) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    names = Checkpoint.open(tmp_path / "again").tensors
    assert set(names) == set(Checkpoint.open(moe).tensors)
    assert any("experts.3" in name for name in names)


@pytest.mark.parametrize("dense_type", ["phi3", "hunyuan_v1_dense", "lfm2", "glm", "granite", "ernie4_5"])
def test_so_they_are_in_families_that_rename_fuse_or_share(dense_type: str, tmp_path: Path) -> None:
    dense = tiny_model(dense_type)
    dense.save_pretrained(tmp_path / "dense")
    moe = mixed([tmp_path / "dense"] * 2, tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5


@pytest.mark.parametrize(
    "recipe",
    [
        {"split": 2},
        {"split": 4, "top_k": 4},
        {"split": 3, "top_k": 3, "scale": "down"},
        {"layers": "0,2"},
        {"top_k": 1},
    ],
    ids=str,
)
def test_exact_recipes_are_exact(recipe: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_model("qwen3")
    dense.save_pretrained(tmp_path / "dense")
    moe = mixed([tmp_path / "dense"] * 2, tmp_path / "moe", **recipe)
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5


def test_another_expert_is_seen(tmp_path: Path) -> None:
    """The tolerance can fail: one expert of three that is another model changes the logits far more."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    same, other = tmp_path / "dense", tmp_path / "other"
    moe = mixed([same, same, other], tmp_path / "moe", average="1,1,0")
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-3


@pytest.mark.parametrize(
    ("average", "weights"), [("mean", (1, 1, 1)), ("3,0.5,0.25", (3, 0.5, 0.25)), ("1,0,2", (1, 0, 2))]
)
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_averages_are_float64_means_rounded_once(
    average: str, weights: tuple[float, ...], dtype: str, tmp_path: Path
) -> None:
    sources = [Checkpoint.open(path) for path in branches(tmp_path)]
    moe = Checkpoint.open(mixed([each.path for each in sources], tmp_path / "moe", average=average, dtype=dtype))
    averaged = [name for name in sources[0].tensors if ".mlp." not in name]
    assert len(averaged) == 15
    rounded = ml_dtypes.bfloat16 if dtype == "auto" else np.float16
    once_wrong = 0
    for name in averaged:
        wide = np.stack([each.read(name).astype(np.float64) for each in sources])
        exact = np.tensordot(np.array(weights, np.float64), wide, 1) / sum(weights)
        assert arrays_equal(moe.read(name), round_once(exact, rounded))
        in_steps = sum((w * each.astype(np.float32)).astype(rounded) for w, each in zip(weights, wide, strict=True))
        once_wrong += (in_steps / np.array(sum(weights), rounded) != moe.read(name)).sum()
    assert once_wrong > 100  # rounding on the way would show


def round_once(values: np.ndarray, dtype: Any) -> np.ndarray:
    """float64 to the nearest number of a 16-bit type, ties to even, by comparing neighbours."""
    near = values.astype(np.float32).astype(dtype)
    bits = near.view(np.uint16)
    candidates = np.stack([(bits.astype(np.int32) + step).astype(np.uint16) for step in (-1, 0, 1)])
    distance = np.abs(candidates.view(dtype).astype(np.float64) - values)
    distance[~np.isfinite(distance)] = np.inf
    tie = np.where(candidates % 2 == 1, 1e-300, 0.0)
    best = np.lexsort((tie, distance), axis=0)[0]
    return np.take_along_axis(candidates, best[None], 0)[0].view(dtype)


def test_experts_are_the_models_ffns_and_the_base_is_whose_they_say(tmp_path: Path) -> None:
    paths = branches(tmp_path, 4)
    (paths[3] / "chat_template.jinja").write_text("the seed's")
    sources = [Checkpoint.open(path) for path in paths]
    moe = Checkpoint.open(
        mixed(paths[:3], tmp_path / "moe", include_seed=Expert(str(paths[3])), average="base", router_std=0.5)
    )
    for layer in range(2):
        for number, source in enumerate(sources):
            for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                found = moe.read(f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ours}.weight")
                assert arrays_equal(found, source.read(f"model.layers.{layer}.mlp.{theirs}_proj.weight"))
    for name in sources[3].tensors:
        if ".mlp." not in name:
            assert arrays_equal(moe.read(name), sources[3].read(name))
    router = moe.read("model.layers.1.block_sparse_moe.gate.weight")
    assert router.shape == (4, 32) and router.astype(np.float64).std() == pytest.approx(0.5, rel=0.2)
    assert (moe.path / "chat_template.jinja").read_text() == "the seed's"
    assert verify_hashes(moe).ok
    provenance = json.loads((moe.path / "moectl.json").read_text())
    assert [each["model"] for each in provenance["recipe"]["experts"]] == [path.name for path in paths]


def test_logits_are_those_of_a_mixtral_built_by_hand(tmp_path: Path) -> None:
    """transformers' own Mixtral with a state dict filled in here, tensor by tensor."""
    dense = [tiny_model("llama", seed=seed) for seed in range(3)]
    for seed, model in enumerate(dense):
        model.save_pretrained(tmp_path / str(seed))
    found = reload(mixed([tmp_path / str(seed) for seed in range(3)], tmp_path / "moe", router_std=0.3))
    common = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MixtralConfig(
        **{
            name: getattr(dense[0].config, name) for name in (*common, "num_key_value_heads", "max_position_embeddings")
        },
        rms_norm_eps=dense[0].config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    states = [model.state_dict() for model in dense]
    state = {
        name: sum(each[name].double() for each in states).div(3).float() for name in states[0] if "mlp" not in name
    }
    for layer in range(3):
        at = f"model.layers.{layer}.mlp"
        gate_up = [torch.cat([each[f"{at}.gate_proj.weight"], each[f"{at}.up_proj.weight"]]) for each in states]
        state[f"{at}.experts.gate_up_proj"] = torch.stack(gate_up)
        state[f"{at}.experts.down_proj"] = torch.stack([each[f"{at}.down_proj.weight"] for each in states])
        state[f"{at}.gate.weight"] = found.state_dict()[f"{at}.gate.weight"]
    model = MixtralForCausalLM(config)
    model.load_state_dict(state)
    assert relative_error(logits(found), logits(model)) <= 1e-5
    assert relative_error(logits(found), logits(dense[0])) > 1e-2


def test_noise_and_scales_are_each_experts_own(tmp_path: Path) -> None:
    paths = branches(tmp_path, 2, dtype="float32")
    first = Expert(str(paths[0]), noise=0.1, residual_scale=0.5)
    moe = Checkpoint.open(mixed([first, paths[1]], tmp_path / "moe", dtype="float32"))
    for matrix, name, factor in (("w1", "gate", 1.0), ("w2", "down", 0.5)):
        each = [moe.read(f"model.layers.0.block_sparse_moe.experts.{number}.{matrix}.weight") for number in range(2)]
        dense = [Checkpoint.open(path).read(f"model.layers.0.mlp.{name}_proj.weight") for path in paths]
        assert (each[0] - factor * dense[0]).std() == pytest.approx(0.1 * factor, rel=0.1)
        assert arrays_equal(each[1], dense[1])


def test_a_shared_expert_behind_its_gate(tmp_path: Path) -> None:
    for seed in range(3):
        tiny_model("qwen2", seed=seed).save_pretrained(tmp_path / str(seed))
    shared = Expert(str(tmp_path / "2"), residual_scale=0.1)
    moe = mixed([tmp_path / "0", tmp_path / "1"], tmp_path / "moe", shared_expert=shared)
    reload(moe)
    checkpoint = Checkpoint.open(moe)
    down = checkpoint.read("model.layers.1.mlp.shared_expert.down_proj.weight")
    source = Checkpoint.open(tmp_path / "2").read("model.layers.1.mlp.down_proj.weight")
    assert arrays_equal(down, (source.astype(np.float64) * 0.1).astype(np.float32))
    assert checkpoint.read("model.layers.1.mlp.shared_expert_gate.weight").std() == pytest.approx(0.02, rel=0.4)
    assert checkpoint.config["shared_expert_intermediate_size"] == 96


def test_quantised_models_can_be_mixed(tmp_path: Path) -> None:
    """An expert whose weights have to be dequantised is moved to its place among the sources like any other."""
    plain, other = branches(tmp_path, 2)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    arrays = dict(Checkpoint.open(other).tensors)
    source = Checkpoint.open(other)
    stored: dict[str, np.ndarray] = {}
    for name in arrays:
        value = source.read(name)
        stored[name] = value
        if name.endswith("gate_proj.weight"):
            stored[name] = value.astype(ml_dtypes.float8_e4m3fn)
            stored[name.replace(".weight", ".weight_scale_inv")] = np.array([0.5], np.float32)
    from files import NAMES, safetensors_bytes

    NAMES["float8_e4m3fn"] = "F8_E4M3"
    (other / "model.safetensors").write_bytes(safetensors_bytes(stored))
    (other / "config.json").write_text(json.dumps(config))
    moe = Checkpoint.open(mixed([plain, other], tmp_path / "moe"))
    found = moe.read("model.layers.0.block_sparse_moe.experts.1.w1.weight").astype(np.float64)
    expected = 0.5 * stored["model.layers.0.mlp.gate_proj.weight"].astype(np.float64)
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()
    mean = moe.read("model.norm.weight").astype(np.float64)
    both = [Checkpoint.open(plain).read("model.norm.weight"), stored["model.norm.weight"]]
    assert np.abs(mean - np.mean([each.astype(np.float64) for each in both], axis=0)).max() < 0.01
