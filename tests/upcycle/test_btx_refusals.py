"""Models that do not go together are refused, both named; and recipes that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_btx import branches, mixed
from trees import dense_llama

from moectl.checkpoint.source import Checkpoint
from moectl.data.tokens import byte_tokenizer
from moectl.errors import InputError, MoectlError, UsageError
from moectl.families.tiny import tiny_model
from moectl.upcycle.btx_lora import split_name
from moectl.upcycle.btx_models import open_models, tokenizer_hash
from moectl.upcycle.btx_recipe import BtxRecipe, Expert


def refusal(*models: Path | str, **recipe: Any) -> MoectlError:
    asked = BtxRecipe(tuple(Expert(str(model)) for model in models), **recipe)
    with pytest.raises(MoectlError) as caught:
        open_models(asked)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 96),
        ("hidden_size", 64),
        ("intermediate_size", 96),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 500000.0),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("sliding_window", 8),
    ],
)
def test_models_that_compute_otherwise(field: str, value: Any, tmp_path: Path) -> None:
    one = dense_llama(tmp_path / "one")
    other = dense_llama(tmp_path / "other", **{field: value})
    error = refusal(one, other)
    assert isinstance(error, InputError)
    assert "one has" in error.what and "other has" in error.what
    assert {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}.get(field, field) in error.what
    assert error.why and error.fix


@pytest.mark.parametrize("field", ["max_position_embeddings", "eos_token_id", "initializer_range", "unheard"])
def test_what_decides_no_number_may_differ(field: str, tmp_path: Path) -> None:
    one = dense_llama(tmp_path / "one")
    other = dense_llama(tmp_path / "other", **{field: 7})
    open_models(BtxRecipe((Expert(str(one)), Expert(str(other)))))


def test_other_families(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "qwen")
    error = refusal(dense_llama(tmp_path / "one"), tmp_path / "qwen")
    assert error.what == "one has model_type = llama, qwen has qwen3."
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refusal(tmp_path / "t5").what
    tiny_model("gemma3_text", head_dim=16).save_pretrained(tmp_path / "gemma")
    assert "gemma3_text" in refusal(tmp_path / "gemma").what


def test_a_stored_copy_of_a_tied_head_is_no_difference(tmp_path: Path) -> None:
    one = dense_llama(tmp_path / "one", tie_word_embeddings=True)
    other = dense_llama(tmp_path / "other", tie_word_embeddings=True)
    source = Checkpoint.open(other)
    arrays = {name: source.read(name) for name in source.tensors}
    save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}, other / "model.safetensors")
    for order in ([one, other], [other, one]):
        out = Checkpoint.open(mixed(order, tmp_path / f"out-{order[0].name}"))
        assert "lm_head.weight" not in out.tensors


def tokenizer(directory: Path, change: str = "") -> Path:
    """A model with a byte-level tokenizer, changed in one respect."""
    path = dense_llama(directory, vocab_size=300)
    byte_tokenizer().save_pretrained(path)
    document = json.loads((path / "tokenizer.json").read_text())
    match change:
        case "vocabulary":
            vocab = document["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        case "merges":
            document["model"]["merges"] = [["a", "b"]]
            document["model"]["vocab"]["ab"] = 299
        case "special":
            document["added_tokens"].append({**document["added_tokens"][0], "id": 298, "content": "<new>"})
        case "padding":
            document["padding"] = None
    (path / "tokenizer.json").write_text(json.dumps(document, indent=2 if change else 1))
    return path


@pytest.mark.parametrize("change", ["vocabulary", "merges", "special"])
def test_other_tokenizers(change: str, tmp_path: Path) -> None:
    one, other = tokenizer(tmp_path / "one"), tokenizer(tmp_path / "other", change)
    error = refusal(one, other)
    assert error.what == "one and other have different tokenizers."
    assert "--allow-tokenizer-mismatch" in error.fix
    mixed([one, other], tmp_path / "out", allow_tokenizer_mismatch=True)


def test_the_same_tokens_in_another_file(tmp_path: Path) -> None:
    """What a file says about padding or its own layout decides no token number; nor does a file that is not there."""
    one, other = tokenizer(tmp_path / "one"), tokenizer(tmp_path / "other", "padding")
    assert (one / "tokenizer.json").read_bytes() != (other / "tokenizer.json").read_bytes()
    open_models(BtxRecipe((Expert(str(one)), Expert(str(other)))))
    for path in (other / "tokenizer.json", other / "tokenizer_config.json"):
        path.unlink()
    open_models(BtxRecipe((Expert(str(one)), Expert(str(other)))))
    (other / "tokenizer.model").write_bytes(b"sentences")
    assert tokenizer_hash(Checkpoint.open(other)) is not None
    refusal(one, other)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({"top_k": 3}, "--top-k 3 of 2 experts"),
        ({"top_k": 0}, "--top-k 0"),
        ({"split": 0}, "--split 0"),
        ({"split": 5000}, "--split 5000"),
        ({"split": 2, "top_k": 3}, "not a multiple of --split 2"),
        ({"average": "1,2,3"}, "2 weights"),
        ({"average": "0,0"}, "2 weights"),
        ({"average": "1,-1"}, "2 weights"),
        ({"average": "nan,1"}, "2 weights"),
        ({"average": "inf,1"}, "2 weights"),
        ({"average": "median\x1b"}, r"median.*x1b' is neither"),
        ({"router_init": "best"}, "--router-init 'best'"),
        ({"router_tokens": "first"}, "--router-tokens"),
        ({"router_init": "text"}, "has no text"),
        ({"router_logit_std": 0.0}, "--router-logit-std"),
        ({"router_std": -1.0}, "--router-std"),
        ({"noise": float("nan")}, "--noise"),
        ({"dtype": "int8"}, "--dtype"),
        ({"scale": "cube"}, "--scale"),
        ({"shard_bytes": 0}, "--shard-size"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_meant(recipe: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        BtxRecipe((Expert("a"), Expert("b")), **recipe).check()


def test_experts_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="No EXPERT"):
        BtxRecipe(()).check()
    for bad in ({"noise": -1.0}, {"residual_scale": float("inf")}, {"residual_scale": float("nan")}):
        with pytest.raises(UsageError):
            BtxRecipe((Expert("a"), Expert("b", **bad))).check()


def test_what_the_family_cannot_hold(tmp_path: Path) -> None:
    paths = branches(tmp_path, 2)
    with pytest.raises(UsageError, match="mixtral cannot keep layers 1 dense"):
        mixed(paths, tmp_path / "out", layers="0")
    with pytest.raises(InputError, match="not a multiple of --split 5"):
        mixed(paths, tmp_path / "out", split=5, top_k=5)
    error = refusal(*paths, into="mixtral", shared_expert=Expert(str(paths[0])))
    assert "gated shared expert" in error.what and "qwen2_moe" in error.fix
    assert "cannot become" in refusal(*paths, into="olmoe").what


def test_a_plus_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert split_name(str(tmp_path / "a+b")) == (str(tmp_path / "a+b"), None)
    assert split_name("org/base+org/lora") == ("org/base", "org/lora")
    assert split_name("+lora") == ("+lora", None)


def test_nonfinite_weights_are_named(tmp_path: Path) -> None:
    paths = branches(tmp_path, 2, dtype="float32")
    source = Checkpoint.open(paths[1])
    arrays = {name: source.read(name).copy() for name in source.tensors}
    arrays["model.norm.weight"][3] = np.nan
    save_file(arrays, paths[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight of branch1"):
        mixed(paths, tmp_path / "out")
