"""Splitting: parts are a balanced partition, all of them are the dense function, and fewer of them a measured loss."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import train
from scipy.optimize import linear_sum_assignment
from test_pairs import logits, relative_error, reload
from transformers import LlamaConfig, LlamaForCausalLM
from trees import dense_llama
from typer.testing import CliRunner

from moectl.checkpoint.expressions import Expression, Index, children
from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.data.documents import read_documents
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer, token_batches
from moectl.errors import InputError, UsageError
from moectl.evaluation.compare import load
from moectl.evaluation.heldout import heldout_batches, heldout_loss
from moectl.families.tiny import tiny_model
from moectl.layerwise.first_text import first_sequences
from moectl.upcycle import split as split_module
from moectl.upcycle import split_statistics
from moectl.upcycle.split import plan_split
from moectl.upcycle.split_assign import METHODS, balanced_assignment, clusters
from moectl.upcycle.split_recipe import SplitRecipe
from moectl.upcycle.split_statistics import ACTIVE_SHARE, Activations, activations, pattern

ARITHMETIC = ["builtin:arithmetic"]
TOKENS = np.random.default_rng(0).integers(0, 128, (4, 32))


def split(dense: Path, out: Path, rates: Any = None, **recipe: Any) -> Path:
    write(plan_split(Checkpoint.open(dense), SplitRecipe(**recipe), rates), out)
    return out


@pytest.mark.parametrize(
    ("dense_type", "recipe"),
    [
        ("llama", {"experts": 8, "grouping": "kmeans"}),
        ("llama", {"experts": 3, "grouping": "random"}),
        ("qwen2", {"experts": 8, "grouping": "active", "shared": 2}),
        ("llama", {"experts": 8, "scale": "down", "into": "granitemoe"}),
        ("qwen3", {"experts": 4}),
        ("qwen3", {"experts": 4, "layers": "0,2"}),
        ("qwen2", {"experts": 4}),
        ("qwen2", {"experts": 8, "shared": 3}),
        ("granite", {"experts": 6, "shared": 2, "into": "granitemoeshared"}),
        ("llama", {"experts": 6, "shared": 2, "into": "glm4_moe"}),
        ("llama", {"experts": 6, "into": "glm4_moe"}),
        ("phi3", {"experts": 4}),
        ("hunyuan_v1_dense", {"experts": 4, "shared": 1}),
    ],
    ids=str,
)
def test_all_parts_are_the_dense_function(dense_type: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_model(dense_type)
    dense.save_pretrained(tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense")
    rates = activations(source, TOKENS, ["random"]) if SplitRecipe(**recipe).measured else None
    moe = split(tmp_path / "dense", tmp_path / "moe", rates, **recipe)
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5
    load(Checkpoint.open(moe))  # refuses missing and unexpected keys
    facts = plan_split(source, SplitRecipe(**recipe), rates).facts
    assert facts["exact"] and facts["active_parameters"] == facts["parameters"]


def test_powers_of_two_are_exact_in_bfloat16(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    moe = split(tmp_path / "dense", tmp_path / "moe", experts=8)
    assert relative_error(logits(reload(moe)), logits(reload(tmp_path / "dense"))) <= 1e-5


@pytest.mark.parametrize(
    "recipe",
    [{"top_k": 2}, {"router": "analytic"}, {"router": "random"}, {"scale": "none"}, {"scale": "cbrt"}],
    ids=str,
)
def test_the_others_are_not_and_say_so(recipe: dict[str, Any], tmp_path: Path) -> None:
    """They also show that the tolerance of the exact ones would notice."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    moe = split(tmp_path / "dense", tmp_path / "moe", experts=4, **recipe)
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-4
    assert not SplitRecipe(experts=4, **recipe).keeps_function
    assert "computes the same function" not in (moe / "README.md").read_text()


def test_one_neuron_in_the_wrong_place_would_be_noticed(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = reload(split(tmp_path / "dense", tmp_path / "moe", experts=4))
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[[0, 1], :, 0] = experts.down_proj[[1, 0], :, 0]
    assert relative_error(logits(model), logits(dense)) > 1e-4


def neurons(plan: Plan, pattern: str, dim: int) -> list[tuple[int, ...]]:
    """The neurons that the tensors of a name take from a dense matrix, expert by expert."""

    def taken(x: Expression) -> list[tuple[int, ...]]:
        own = [x.index] if isinstance(x, Index) and x.dim == dim and isinstance(x.index, tuple) else []
        return own + [found for child in children(x) for found in taken(child)]

    return [found for tensor in plan.tensors if pattern in tensor.name for found in taken(tensor.expression)]


@pytest.mark.parametrize("grouping", METHODS)
def test_experts_partition_the_neurons_the_same_way_in_every_matrix(grouping: str, tmp_path: Path) -> None:
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    seen = activations(source, TOKENS % 64, ["random"])
    plan = plan_split(source, SplitRecipe(experts=6, top_k=2, grouping=grouping), seen)
    for layer in range(2):
        groups = [neurons(plan, f"layers.{layer}.block_sparse_moe.experts.", dim) for dim in (0, 1)]
        gate, up, down = groups[0][::2], groups[0][1::2], groups[1]
        assert gate == up == down and {len(part) for part in gate} == {8}
        assert sorted(neuron for part in gate for neuron in part) == list(range(48))
    other = plan_split(source, SplitRecipe(experts=6, top_k=2, grouping=grouping, seed=1), seen)
    assert plan.fingerprint == plan_split(source, SplitRecipe(experts=6, top_k=2, grouping=grouping), seen).fingerprint
    assert plan.fingerprint != other.fingerprint
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), [source]).tensors == plan.tensors


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    parts=st.integers(1, 7),
    each=st.integers(1, 9),
    equal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clusters_are_balanced(method: str, parts: int, each: int, equal: bool, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((parts * each, 5)).astype(np.float32)
    rows[: parts * each // 2] += 10  # far more near one centre than fit
    if equal:
        rows[:] = 1.0
    labels = clusters(method, rows, np.arange(parts * each), parts, seed, "key")
    assert np.bincount(labels, minlength=parts).tolist() == [each] * parts


@settings(max_examples=150, deadline=None)
@given(
    parts=st.integers(1, 6),
    each=st.integers(1, 8),
    kind=st.sampled_from(["real", "ties", "crowded"]),
    seed=st.integers(0, 999),
)
def test_no_balanced_assignment_is_cheaper(parts: int, each: int, kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    cost = generator.standard_normal((parts * each, parts))
    if kind == "ties":
        cost = np.rint(2 * cost)
    if kind == "crowded":
        cost[:, 0] -= 3
    labels = balanced_assignment(cost)
    assert np.bincount(labels, minlength=parts).tolist() == [each] * parts
    rows, columns = linear_sum_assignment(np.repeat(cost, each, axis=1))
    best = np.repeat(cost, each, axis=1)[rows, columns].sum()
    assert cost[np.arange(len(cost)), labels].sum() == pytest.approx(best, abs=1e-9)


def test_rates_and_patterns_are_of_the_largest_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the activations of the whole model, computed from its modules."""
    dense = tiny_model("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(split_statistics, "PATTERN_TOKENS", 40)
    found = activations(Checkpoint.open(tmp_path / "dense"), TOKENS, ["random"])
    seen: list[torch.Tensor] = []
    mlp = dense.model.layers[1].mlp
    mlp.register_forward_hook(
        lambda _m, args, _o: seen.append(mlp.act_fn(mlp.gate_proj(args[0])) * mlp.up_proj(args[0]))
    )
    with torch.no_grad():
        dense(input_ids=torch.from_numpy(TOKENS))
    activation = seen[0].abs().flatten(0, 1).numpy()
    count = round(ACTIVE_SHARE * 96)
    threshold = np.sort(activation, axis=1)[:, -count][:, None]
    assert np.allclose(found.rates[1], (activation >= threshold).mean(axis=0), atol=2 / TOKENS.size)
    assert found.tokens == TOKENS.size and set(found.rates) == set(found.patterns) == {0, 1, 2}
    some = np.linspace(0, TOKENS.size - 1, 40).astype(int)
    unlike = pattern(found.patterns[1])[:, :40] != (activation >= threshold)[some].T
    assert unlike.sum() <= 2 and len(set(some)) == 40 and {0, TOKENS.size - 1} <= set(some), "but for rounding"


def test_neurons_that_are_active_together_go_together(tmp_path: Path) -> None:
    """Planted: six groups of eight neurons, each active on its own tokens, but for one bit in fifty."""
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    generator = np.random.default_rng(0)
    group_F = generator.permutation(np.arange(48) % 6)
    active_FP = (np.arange(240) % 6 == group_F[:, None]) ^ (generator.random((48, 240)) < 0.02)
    packed = {layer: np.packbits(active_FP, axis=1) for layer in range(2)}
    recipe = SplitRecipe(experts=6, top_k=2, grouping="active")

    def parts(packed: dict[int, np.ndarray]) -> set[tuple[int, ...]]:
        seen = Activations({layer: active_FP.mean(1) for layer in range(2)}, packed, 240, ("planted",))
        return set(neurons(plan_split(source, recipe, seen), "layers.1.block_sparse_moe.experts.", 1))

    planted = {tuple(np.flatnonzero(group_F == group).tolist()) for group in range(6)}
    assert parts(packed) == planted
    assert parts({layer: each[::-1] for layer, each in packed.items()}) != planted, "of other neurons"


def test_shared_neurons_are_the_most_active_and_statistics_enter_the_fingerprint(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense")
    recipe = SplitRecipe(experts=4, shared=1, top_k=1)
    rates = activations(source, TOKENS, ["random"])
    plan = plan_split(source, recipe, rates)
    shared = neurons(plan, "layers.2.mlp.shared_expert.gate_proj", 0)[0]
    others = sorted(set(range(96)) - set(shared))
    assert rates.rates[2][list(shared)].min() >= rates.rates[2][others].max() and len(shared) == 24
    again = activations(source, TOKENS[:, ::-1].copy(), ["random"])
    assert plan_split(source, recipe, again).fingerprint != plan.fingerprint
    assert plan.recipe["statistics"]["tokens"] == TOKENS.size


def test_statistics_are_kept_and_plan_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "dense")
    source, place = Checkpoint.open(tmp_path / "dense"), tmp_path / "statistics"
    recipe = SplitRecipe(experts=4, shared=1, top_k=1)

    def plan(seed: int = 0, tokens: np.ndarray = TOKENS, where: Path | None = place) -> Plan:
        rates = activations(source, tokens, ["random"], where)
        return plan_split(source, replace(recipe, seed=seed), rates, where)

    first = plan()
    assert first.fingerprint == plan(where=None).fingerprint
    files = {path.name.partition("-")[0]: Checkpoint.of_file(path) for path in place.iterdir()}
    assert set(files) == {"activations", "neurons"}
    for layer in range(3):
        expert_F = files["neurons"].read(f"layers.{layer}.expert")
        moe = f"layers.{layer}.mlp."
        planned = neurons(first, f"{moe}shared_expert.gate_proj", 0), neurons(first, f"{moe}experts.", 0)
        kept = [tuple(np.flatnonzero(expert_F == expert)) for expert in range(-1, 3)]
        assert kept == list(dict.fromkeys([*planned[0], *planned[1]]))

    def never(*_: Any) -> None:
        raise AssertionError("it was measured again")

    with monkeypatch.context() as patch:
        patch.setattr(split_module, "clusters", never)
        patch.setattr(split_statistics, "_measured", never)
        assert plan().fingerprint == first.fingerprint
        for other in ({"seed": 1}, {"tokens": TOKENS[:, ::-1].copy()}):
            with pytest.raises(AssertionError, match="measured again"):
                plan(**other)
    weights = tmp_path / "dense" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    source = Checkpoint.open(tmp_path / "dense")
    plan()
    assert len(list(place.iterdir())) == 4, "changed weights have statistics of their own"


def test_analytic_router_rows_are_mean_gate_rows(tmp_path: Path) -> None:
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    recipe = SplitRecipe(experts=4, top_k=2, dtype="float32")
    moe = Checkpoint.open(split(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2, dtype="float32"))
    gate = source.read("model.layers.1.mlp.gate_proj.weight").astype(np.float64)
    parts = neurons(plan_split(source, recipe), "layers.1.block_sparse_moe.experts.", 1)
    rows = np.stack([gate[list(part)].mean(axis=0) for part in parts]) - gate.mean(axis=0)
    assert np.allclose(moe.read("model.layers.1.block_sparse_moe.gate.weight"), rows / 64, atol=1e-8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level Llama that has seen 200,000 bytes of arithmetic."""
    directory = tmp_path_factory.mktemp("trained") / "dense"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, eos_token_id=BYTE_EOS_ID, initializer_range=0.1, **sizes))
    tokenizer = byte_tokenizer()
    documents = read_documents(ARITHMETIC, "train")
    batches = token_batches(
        documents, tokenizer.encode, eos_id=BYTE_EOS_ID, sequence_length=128, batch_size=16, seed=0, repeat=True
    )
    train(model, batches, steps=100, learning_rate=5e-3, warmup=10)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def first_tokens(trained: Path) -> np.ndarray:
    """What the command looks at to see which neurons are active."""
    return first_sequences(Checkpoint.open(trained), ARITHMETIC, 128, 32, why="", fix="")


def test_clusters_and_their_router_lose_less_than_chance(trained: Path, tmp_path: Path) -> None:
    """Means over three seeds: k-means on gate rows, which the router sees, against neurons or router rows at random;
    and on when neurons are active, against that."""
    batches = heldout_batches(
        ARITHMETIC, lambda text: list(text.encode()), eos_id=256, sequence_length=128, batch_size=16, max_batches=2
    )
    loss = {"dense": heldout_loss(load(Checkpoint.open(trained)), batches)["mean"]}
    seen = activations(Checkpoint.open(trained), first_tokens(trained), ARITHMETIC)
    for name, recipe in {
        "kmeans-gate": {},
        "random": {"grouping": "random"},
        "random router": {"router": "random"},
        "active": {"grouping": "active"},
        "more of them": {"top_k": 4},
    }.items():
        splits = [
            split(trained, tmp_path / f"{name} {seed}", seen, **{"top_k": 2, "seed": seed, **recipe})
            for seed in range(3)
        ]
        loss[name] = np.mean([heldout_loss(load(Checkpoint.open(moe)), batches)["mean"] for moe in splits])
    print(loss)
    assert loss["dense"] < loss["more of them"] < loss["kmeans-gate"] < loss["random"] < loss["random router"], loss
    assert loss["dense"] < loss["active"] < loss["kmeans-gate"], loss


@pytest.mark.parametrize("asked", [["--shared", "2"], ["--method", "active"]])
def test_the_command_says_what_was_lost(asked: list[str], trained: Path, tmp_path: Path) -> None:
    arguments = ["--top-k", "1", *asked, "--into", "qwen2_moe", "--data", "builtin:arithmetic"]
    done = CliRunner().invoke(app, ["upcycle", "split", str(trained), "-o", str(tmp_path / "moe"), *arguments])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'moe'}\n"), done.stderr
    before, after = done.stderr.split("mean: ")[1].split()[0::2]
    assert 0 < float(before) < float(after) < 6
    assert json.loads((tmp_path / "moe" / "moectl.json").read_text())["recipe"]["statistics"]["data"] == ARITHMETIC


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"experts": 5}, "not a multiple of --experts 5"),
        ({"experts": 1}, "not from 2 to"),
        ({"top_k": 9}, "--top-k 9 of 8 routed experts is impossible"),
        ({"top_k": 0}, "impossible"),
        ({"shared": 8}, "--shared 8 of --experts 8 is impossible"),
        ({"shared": 2, "top_k": 7}, "besides 2 shared"),
        ({"shared": 2}, "mixtral has no shared expert"),
        ({"layers": "0"}, "cannot keep layers 1 dense"),
        ({"grouping": "metis"}, "'metis' is not known"),
        ({"router": "trained"}, "'trained' is not known"),
        ({"router_std": float("nan")}, "--router-std nan"),
        ({"dtype": "float64"}, "'float64' is not known"),
        ({"into": "solar_open", "experts": 2, "shared": 1}, "too few"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    with pytest.raises((UsageError, InputError), match=message) as refused:
        plan_split(source, SplitRecipe(**recipe))
    assert refused.value.fix


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="t5 cannot be split"):
        plan_split(Checkpoint.open(tmp_path / "dense"), SplitRecipe())
