"""Recipes that keep the function keep it exactly; those that give it up do what their paper says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pairs import logits, relative_error, reload, upcycled
from trees import dense_llama

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.families.tiny import tiny_model
from moectl.upcycle.experts import scale_factors
from moectl.upcycle.recipe import SparseRecipe, chosen_layers
from moectl.upcycle.sparse import plan_sparse

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"experts": 8, "granularity": 2, "top_k": 2}),
    ("llama", {"experts": 16, "granularity": 8, "top_k": 8}),
    ("qwen3", {"experts": 16, "granularity": 8, "top_k": 16}),
    ("qwen3", {"experts": 8, "granularity": 2, "top_k": 4, "scale": "updown"}),
    ("qwen3", {"experts": 6, "granularity": 3, "top_k": 3, "scale": "down"}),
    ("qwen2", {"experts": 8, "granularity": 4, "top_k": 4, "shuffle": True}),
    ("qwen3", {"experts": 4, "shuffle": True}),
    ("qwen2", {"layers": "every:2"}),
    ("qwen3", {"layers": "last:1", "granularity": 2}),
    ("qwen3", {"layers": "0,2"}),
    ("qwen2", {"residual": True}),
    ("qwen2", {"shared_experts": True, "layers": "last:2"}),
    ("qwen2", {"shared_experts": True, "granularity": 2}),
]


@pytest.mark.parametrize(("dense_type", "recipe"), EXACT, ids=str)
def test_exact_recipes_are_exact(dense_type: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_model(dense_type, **({"head_dim": 16} if dense_type == "qwen3" else {}))
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycled(tmp_path / "dense", tmp_path / "moe", **recipe)
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5
    assert SparseRecipe(**recipe).keeps_function


@pytest.mark.parametrize(
    "recipe",
    [
        {"experts": 8, "granularity": 2, "top_k": 2, "scale": "none"},
        {"experts": 8, "granularity": 2, "top_k": 2, "scale": "cbrt"},
        {"experts": 8, "granularity": 2, "top_k": 3, "scale": "down"},
        {"drop": 0.5},
        {"reinit": 0.5},
        {"noise": 0.02},
    ],
    ids=str,
)
def test_the_others_are_not_and_say_so(recipe: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycled(tmp_path / "dense", tmp_path / "moe", **{"experts": 4, **recipe})
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-3
    assert not SparseRecipe(**recipe).keeps_function
    assert "close to its source, not equal" in (moe / "README.md").read_text()


def test_automatic_scale_is_exact_in_bfloat16(tmp_path: Path) -> None:
    """Powers of two lose nothing: a bf16 source cut in 8 is the bf16 model, which sqrt(8) would miss."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    expected = logits(reload(tmp_path / "dense"))
    errors = {}
    for scale in ("auto", "updown"):
        moe = upcycled(tmp_path / "dense", tmp_path / scale, experts=8, granularity=8, top_k=8, scale=scale)
        errors[scale] = relative_error(logits(reload(moe)), expected)
    assert errors["auto"] <= 1e-5 < 1e-4 < errors["updown"]


@pytest.mark.parametrize("granularity", [1, 2, 3, 4, 5, 8, 16, 64])
def test_factors_multiply_to_what_the_cut_takes_away(granularity: int) -> None:
    for scale in ("auto", "updown", "down"):
        gate, up, down = scale_factors(granularity, scale)
        assert gate == 1.0 and up * down == pytest.approx(granularity, rel=1e-15)
    assert np.prod(scale_factors(granularity, "cbrt")) == pytest.approx(granularity)
    if granularity & (granularity - 1) == 0:
        assert all(np.log2(factor) % 1 == 0 for factor in scale_factors(granularity, "auto"))


def test_router_rows_of_one_copy_are_equal(tmp_path: Path) -> None:
    recipe = {"experts": 6, "granularity": 2, "top_k": 2, "dtype": "float32"}
    moe = Checkpoint.open(upcycled(dense_llama(tmp_path / "dense"), tmp_path / "moe", **recipe))
    router = moe.read("model.layers.1.block_sparse_moe.gate.weight")
    assert (router[0::2] == router[1::2]).all() and len(np.unique(router, axis=0)) == 3
    assert moe.config["intermediate_size"] == 24
    assert router.std() == pytest.approx(0.02, rel=0.3)


def expert(moe: Checkpoint, number: int) -> list[np.ndarray]:
    """Gate, up and transposed down of an expert of layer 0: a neuron is a row of each."""
    name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    gate, up, down = (moe.read(name.format(number, matrix)) for matrix in ("w1", "w3", "w2"))
    return [gate, up, down.T]


def dense_ffn(source: Checkpoint) -> list[np.ndarray]:
    gate, up, down = (source.read(f"model.layers.0.mlp.{m}_proj.weight").astype("f4") for m in ("gate", "up", "down"))
    return [gate, up, down.T]


def test_drop_replaces_whole_neurons_of_an_expert(tmp_path: Path) -> None:
    """One set of neurons for the three matrices, another for each expert; the new values look like the old ones."""
    source = Checkpoint.open(dense_llama(tmp_path / "dense", intermediate_size=400))
    recipe = {"experts": 3, "drop": 0.25, "dtype": "float32"}
    moe = Checkpoint.open(upcycled(source.path, tmp_path / "moe", **recipe))
    original, sets = dense_ffn(source), []
    for number in range(3):
        found = expert(moe, number)
        changed = [(a != b).any(axis=1) for a, b in zip(found, original, strict=True)]
        assert (changed[0] == changed[1]).all() and (changed[0] == changed[2]).all()
        assert changed[0].sum() == 100
        sets.append(changed[0])
        for new, old in zip(found, original, strict=True):
            replaced, before = new[changed[0]], old[changed[0]]
            assert replaced.std() == pytest.approx(before.std(), rel=0.1) and abs(replaced.mean() - before.mean()) < 0.1
            assert abs(np.corrcoef(replaced.ravel(), before.ravel())[0, 1]) < 0.1
    assert (sets[0] != sets[1]).any() and (sets[1] != sets[2]).any()


def test_shuffle_and_reinit_as_in_qwen2(tmp_path: Path) -> None:
    """Every copy has its own order, the same for its matrices; about half of the weights are new."""
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    original = np.concatenate(dense_ffn(source), axis=1)
    moe = Checkpoint.open(
        upcycled(
            source.path, tmp_path / "a", experts=4, granularity=2, top_k=2, scale="none", shuffle=True, dtype="float32"
        )
    )
    orders = []
    for copy in (0, 1):
        neurons = np.concatenate([np.concatenate(expert(moe, 2 * copy + g), axis=1) for g in (0, 1)])
        assert sorted(map(bytes, neurons)) == sorted(map(bytes, original))
        orders.append([next(i for i, row in enumerate(original) if (row == neuron).all()) for neuron in neurons])
    assert orders[0] != orders[1] != list(range(len(original)))
    moe = Checkpoint.open(upcycled(source.path, tmp_path / "b", experts=2, reinit=0.5, dtype="float32"))
    kept = np.mean([(a == b).mean() for a, b in zip(expert(moe, 1), dense_ffn(source), strict=True)])
    assert kept == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:1", (0, 1, 2, 3, 4, 5)),
        ("last:2", (4, 5)),
        ("5,0, 3", (0, 3, 5)),
        ("2", (2,)),
    ],
)
def test_layers_by_name(text: str, layers: tuple[int, ...]) -> None:
    assert chosen_layers(text, 6) == layers


@pytest.mark.parametrize(
    "text", ["", "none", "every:0", "every:7", "every:x", "last:7", "last:0", "6", "-1", "0,,1", "every"]
)
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="names no layers of a model with 6"):
        chosen_layers(text, 6)


def test_layers_kept_dense_keep_their_names_and_are_listed(tmp_path: Path) -> None:
    tiny_model("qwen3", head_dim=16).save_pretrained(tmp_path / "dense")
    moe = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "moe", layers="1"))
    assert moe.config["mlp_only_layers"] == [0, 2]
    assert "model.layers.0.mlp.up_proj.weight" in moe.tensors
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in moe.tensors
    assert "model.layers.1.mlp.up_proj.weight" not in moe.tensors


def test_mixtral_cannot_hold_dense_layers(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_sparse(Checkpoint.open(dense_llama(tmp_path / "m")), SparseRecipe(layers="0"))
    assert "mixtral cannot keep layers 1 dense" in caught.value.what
    for into in caught.value.fix.partition("--into ")[2].rstrip(".").split(" or "):
        plan_sparse(Checkpoint.open(tmp_path / "m"), SparseRecipe(layers="0", into=into))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"granularity": 3}, "--granularity 3 does not divide --experts 8"),
        ({"granularity": 0}, "--granularity 0"),
        ({"granularity": 4}, "--top-k 2 is not a multiple of --granularity 4"),
        ({"shared_experts": True, "residual": True}, "exclude each other"),
        ({"residual": True}, "mixtral has no shared expert"),
        ({"scale": "half"}, "--scale 'half' is not known"),
        ({"drop": 1.5}, "--drop 1.5"),
        ({"reinit": -0.1}, "--reinit -0.1"),
    ],
)
def test_impossible_combinations(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_sparse(Checkpoint.open(dense_llama(tmp_path / "m")), SparseRecipe(**recipe))
    assert message in caught.value.what and caught.value.fix


def test_a_width_that_cannot_be_cut(tmp_path: Path) -> None:
    source = Checkpoint.open(dense_llama(tmp_path / "m", intermediate_size=50))
    with pytest.raises(InputError, match="intermediate_size = 50, not a multiple of --granularity 4"):
        plan_sparse(source, SparseRecipe(granularity=4, top_k=4))


def test_active_parameters_are_counted(tmp_path: Path) -> None:
    plan = plan_sparse(Checkpoint.open(dense_llama(tmp_path / "m")), SparseRecipe(experts=8, granularity=2, top_k=4))
    per_expert = 2 * 3 * 32 * 24
    assert plan.facts["parameters"] - plan.facts["active_parameters"] == 4 * per_expert
    assert json.dumps(plan.to_json())
