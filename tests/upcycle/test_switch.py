"""T5 -> Switch: two stacks, one expert per token, and a router of zeros that makes it the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed, needs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError, UsageError
from moectl.evaluation.compare import compare
from moectl.evaluation.inspect import inspect
from moectl.families.switch import CAPACITY
from moectl.families.tiny import tiny_model
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

LENGTH = 160
"""Longer than the largest distance that has a bucket of its own, and than transformers' default capacity."""


def dense_t5(path: Path, untied: bool = False, changes: dict[str, Any] | None = None, **options: Any) -> Path:
    """A random T5 on disk, its position biases large enough to matter; `changes` are made to its config.json."""
    model = tiny_model("t5", **options)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            bias.copy_(torch.randn(bias.shape))
    model.save_pretrained(path)
    if untied:
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = 0.3 * torch.randn(weights["shared.weight"].shape)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({name: value for name, value in (config | (changes or {})).items() if value is not ...})
    )
    return path


OLD_UNTIED = {"tie_word_embeddings": False, "scale_decoder_outputs": ...}
"""What a config.json of transformers 4 says."""


def upcycled(dense: Path, out: Path, **recipe: Any) -> Path:
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(**{"experts": 4, "top_k": 1, **recipe})), out)
    return out


def reload(path: Path) -> Any:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: Any, length: int = LENGTH) -> torch.Tensor:
    """Logits of fixed random ids, other ones and fewer of them for the decoder."""
    draw = torch.Generator().manual_seed(1)
    ids, decoder_ids = (
        torch.randint(3, 128, (2, length), generator=draw),
        torch.randint(3, 128, (2, 90), generator=draw),
    )
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
    return found


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "tied in old words": {"changes": {"scale_decoder_outputs": ...}},
    "untied": {"untied": True, "changes": OLD_UNTIED},
    "untied, scaled": {"untied": True},
    "tied, not scaled": {"changes": OLD_UNTIED},
    "not scaled, in new words": {"changes": {"scale_decoder_outputs": False}},
    "deeper decoder": {"num_decoder_layers": 5, "num_hidden_layers": 2},
    "one layer each": {"num_decoder_layers": 1, "num_hidden_layers": 1},
    "same depth unsaid": {"num_decoder_layers": 3, "changes": {"num_decoder_layers": ...}},
    "distances": {"relative_attention_max_distance": 40, "relative_attention_num_buckets": 16},
    "odd eps": {"layer_norm_epsilon": 3e-2},
    "no activation of its own": {"feed_forward_proj": "gelu"},
    "wide heads": {"d_kv": 48},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", [{}, {"experts": 6, "shard_bytes": 200_000}], ids=["4 experts", "6 in shards"])
def test_switch_equals_t5(
    case: str, recipe: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("pair", "t5 -> switch_transformers")
    dense = reload(dense_t5(tmp_path / "dense", **CASES[case]))
    out = upcycled(tmp_path / "dense", tmp_path / "moe", **recipe)
    model = reload(out)
    assert gap(logits(model), logits(dense)) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    again, first = Checkpoint.open(tmp_path / "again"), Checkpoint.open(out)
    shapes = [{name: ref.shape for name, ref in checkpoint.tensors.items()} for checkpoint in (again, first)]
    assert shapes[0] == shapes[1]
    assert gap(logits(reload(tmp_path / "again")), logits(dense)) <= 1e-5


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 3), (4, 5), (7, 6)])
def test_every_second_layer(encoder: int, decoder: int, tmp_path: Path) -> None:
    """The layers of the published Switch models, and of the paper's upcycled T5."""
    dense = reload(dense_t5(tmp_path / "dense", num_hidden_layers=encoder, num_decoder_layers=decoder))
    model = reload(upcycled(tmp_path / "dense", tmp_path / "moe", layers="every:2"))
    assert gap(logits(model), logits(dense)) <= 1e-5
    for stack in (model.encoder, model.decoder):
        assert [block.is_sparse for block in stack.block] == [bool(layer % 2) for layer in range(len(stack.block))]


def test_sixteen_bit_source(tmp_path: Path) -> None:
    """1/E and wo times E are the same bits in bfloat16 if E is a power of two, and only then is it called exact."""
    tiny_model("t5").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense")
    assert gap(logits(reload(upcycled(source.path, tmp_path / "moe"))), logits(reload(source.path))) <= 1e-5
    assert plan_sparse(source, SparseRecipe(top_k=1)).facts["exact"]
    assert not plan_sparse(source, SparseRecipe(top_k=1, experts=6)).facts["exact"]


@pytest.mark.parametrize("recipe", [{"router_std": 0.02}, {"noise": 0.02}, {"router_std": 1.0}], ids=str)
def test_what_can_be_trained_at_once_is_another_function(recipe: dict[str, Any], tmp_path: Path) -> None:
    dense = reload(dense_t5(tmp_path / "dense"))
    plan = plan_sparse(Checkpoint.open(tmp_path / "dense"), SparseRecipe(top_k=1, **recipe))
    assert plan.facts["exact"] is False
    assert "close to its source, not equal" in plan.files["README.md"]
    assert ("multiplied by 8 times the largest of 8 probabilities" in plan.files["README.md"]) == (
        "router_std" in recipe
    )
    write(plan, tmp_path / "moe")
    assert gap(logits(reload(tmp_path / "moe")), logits(dense)) > 1e-3


def test_the_exact_mode_is_the_default(tmp_path: Path) -> None:
    source = Checkpoint.open(dense_t5(tmp_path / "dense"))
    plan, zero = (plan_sparse(source, SparseRecipe(top_k=1, router_std=std)) for std in (None, 0.0))
    assert plan.facts["exact"] is True and plan.recipe["router_std"] == 0.0
    assert plan.fingerprint == zero.fingerprint
    card = plan.files["README.md"]
    assert "AutoModelForSeq2SeqLM" in card and "every token goes to expert 0" in card
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    assert plan_sparse(Checkpoint.open(tmp_path / "llama"), SparseRecipe()).recipe["router_std"] == 0.02


def test_parameters_are_those_of_transformers(tmp_path: Path) -> None:
    plan = plan_sparse(Checkpoint.open(dense_t5(tmp_path / "dense")), SparseRecipe(top_k=1))
    write(plan, tmp_path / "moe")
    found = inspect(Checkpoint.open(tmp_path / "moe"))
    assert found.parameters == plan.facts["parameters"] == sum(p.numel() for p in reload(tmp_path / "moe").parameters())
    assert found.active_parameters == plan.facts["active_parameters"]


SPOILT = {
    "expert_capacity": 64,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "dense_act_fn": "silu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("field", SPOILT if installed("switch_transformers") else SPOILT.keys() - {"expert_capacity"})
def test_the_tolerance_can_fail(field: str, tmp_path: Path) -> None:
    """Planted errors: tokens beyond an expert's capacity are dropped, and every translated field matters."""
    dense = reload(dense_t5(tmp_path / "dense", layer_norm_epsilon=3e-2))
    out = upcycled(tmp_path / "dense", tmp_path / "moe")
    config = json.loads((out / "config.json").read_text())
    assert config["expert_capacity"] == CAPACITY
    (out / "config.json").write_text(json.dumps(config | {field: SPOILT[field]}))
    model = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float32).eval()
    assert gap(logits(model), logits(dense)) > 1e-3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"top_k": 2}, "--top-k 2: switch_transformers sends each token to one expert"),
        ({"granularity": 2, "scale": "down"}, "--granularity is not possible"),
        ({"shared_experts": True}, "--shared-experts is not possible"),
        ({"residual": True}, "--residual is not possible"),
        ({"drop": 0.5}, "--drop is not possible"),
        ({"shuffle": True}, "--shuffle is not possible"),
        ({"reinit": 0.5}, "--reinit is not possible"),
        ({"layers": "last:1"}, "--layers 'last:1' is not possible"),
    ],
)
def test_recipes_without_a_meaning(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = Checkpoint.open(dense_t5(tmp_path / "dense"))
    with pytest.raises(UsageError) as caught:
        plan_sparse(source, SparseRecipe(**{"top_k": 1, **recipe}))
    assert message in caught.value.what and caught.value.fix
    assert "top_k" not in recipe or caught.value.fix == "Give --top-k 1."


@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu"])
def test_v1_1_is_refused(kind: str, tmp_path: Path) -> None:
    tiny_model("t5", feed_forward_proj=kind).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        InputError, match=f"feed_forward_proj is {kind} .T5 v1.1., and switch_transformers has no place"
    ):
        plan_sparse(Checkpoint.open(tmp_path / "dense"), SparseRecipe(top_k=1))


def test_single_layers_cannot_be_left_dense(tmp_path: Path) -> None:
    source = Checkpoint.open(dense_t5(tmp_path / "dense", num_decoder_layers=1))
    with pytest.raises(InputError, match="a stack of one layer"):
        plan_sparse(source, SparseRecipe(top_k=1, layers="every:2"))


def test_a_config_that_leaves_the_rest_to_defaults(tmp_path: Path) -> None:
    sizes = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "model_type", "architectures")
    path = dense_t5(tmp_path / "dense", relative_attention_num_buckets=32, num_decoder_layers=3)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({name: config[name] for name in sizes}))
    assert gap(logits(reload(upcycled(path, tmp_path / "moe"))), logits(reload(path))) <= 1e-5


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """t5-small has a position bias that is never used, and may store its embedding three times more."""
    path = dense_t5(tmp_path / "dense")
    weights = load_file(path / "model.safetensors")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    weights[unused] = torch.randn(8, 4)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights["shared.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    out = upcycled(path, tmp_path / "moe")
    assert unused not in Checkpoint.open(out).tensors
    assert gap(logits(reload(out)), logits(AutoModelForSeq2SeqLM.from_pretrained(path).eval())) <= 1e-5
    weights["lm_head.weight"] = weights["lm_head.weight"][:5].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        plan_sparse(Checkpoint.open(path), SparseRecipe(top_k=1))


@needs("switch_transformers")
def test_verify_compares_encoder_decoders(tmp_path: Path) -> None:
    """Same ids for both stacks; a capacity too short for them is seen."""
    dense = Checkpoint.open(dense_t5(tmp_path / "dense"))
    out = upcycled(dense.path, tmp_path / "moe")
    found = compare(Checkpoint.open(out), dense, tokens=100)
    assert found.relative <= 1e-5 and not found.layerwise
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"expert_capacity": 64}))
    assert compare(Checkpoint.open(out), dense, tokens=100).relative > 1e-3


def test_absurd_depths_are_cheap_to_refuse(tmp_path: Path) -> None:
    path = dense_t5(tmp_path / "dense", changes={"num_decoder_layers": 2**31 - 1})
    with pytest.raises(InputError, match="lacks tensor 'decoder"):
        plan_sparse(Checkpoint.open(path), SparseRecipe(top_k=1))


@needs("switch_transformers")
def test_a_zero_router_learns(tmp_path: Path) -> None:
    """Its gradient is not zero, so the first step of training tells the experts apart; the router's losses count."""
    dense_t5(tmp_path / "dense", num_hidden_layers=2)
    model = reload(upcycled(tmp_path / "dense", tmp_path / "moe", layers="every:2"))
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}
    plain, whole = model(**inputs).loss, model(**inputs, output_router_logits=True).loss
    assert whole > plain
    plain.backward()
    for stack in (model.encoder, model.decoder):
        assert stack.block[1].layer[-1].mlp.router.classifier.weight.grad.abs().max() > 0
