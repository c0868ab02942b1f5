"""Router rows from text are what transformers' own forward shows of the texts, and belong to the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_btx import mixed
from test_pairs import reload

from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import read_documents
from moectl.data.tokens import byte_tokenizer
from moectl.errors import InputError, UsageError
from moectl.families.tiny import tiny_model
from moectl.upcycle import statistics
from moectl.upcycle.btx import plan_btx
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert

PROMPTS = (("def f(x):", "import os; os.getcwd()"), ("Once upon a time there was", "The end."), ("1 + 1 = 2",))
NEGATIVE = ((), ("def g():",), ())


def model(directory: Path, model_type: str = "llama", seed: int = 0, **config: Any) -> Path:
    tiny_model(model_type, seed=seed, vocab_size=258, **config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def experts(directory: Path, model_type: str = "llama", **config: Any) -> tuple[Expert, ...]:
    return tuple(
        Expert(str(model(directory / str(i), model_type, seed=i, **config)), prompts=prompts, negative_prompts=negative)
        for i, (prompts, negative) in enumerate(zip(PROMPTS, NEGATIVE, strict=True))
    )


def seen_by_routers(directory: Path, ffn: str, text: str) -> list[np.ndarray]:
    """What goes into every layer's FFN when transformers runs the whole model in float64 on one text alone."""
    dense = reload(directory).double()
    seen: list[np.ndarray] = []
    for layer in dense.model.layers:
        layer.get_submodule(ffn).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0].numpy()))
    with torch.no_grad():
        dense(torch.tensor([list(text.encode())]))
    return seen


def expected_rows(directory: Path, ffn: str, tokens: str, logit_std: float) -> list[np.ndarray]:
    """The rows of three experts, from their definition."""
    positive = [[seen_by_routers(directory, ffn, text) for text in texts] for texts in PROMPTS]
    negative = [[seen_by_routers(directory, ffn, text) for text in texts] for texts in NEGATIVE]
    result = []
    for layer in range(3):
        cut = slice(-1, None) if tokens == "last" else slice(None)
        vectors = [np.concatenate([seen[layer][cut] for seen in texts]) for texts in positive]
        rows = np.stack([each.mean(axis=0) for each in vectors])
        for i, texts in enumerate(negative):
            if texts:
                rows[i] -= np.concatenate([seen[layer][cut] for seen in texts]).mean(axis=0)
        rows -= rows.mean(axis=0)
        logits = np.concatenate(vectors) @ rows.T
        result.append(rows * logit_std / np.sqrt(np.mean(np.var(logits, axis=1))))
    return result


@pytest.mark.parametrize(
    ("model_type", "ffn", "gate"),
    [
        ("llama", "mlp", "block_sparse_moe.gate"),
        ("qwen3", "mlp", "mlp.gate"),
        ("olmo2", "mlp", "mlp.gate"),
        ("lfm2", "feed_forward", "feed_forward.gate"),
    ],
)
@pytest.mark.parametrize(("tokens", "logit_std"), [("all", 1.0), ("last", 2.5)])
def test_rows_are_of_what_the_router_sees(
    model_type: str, ffn: str, gate: str, tokens: str, logit_std: float, tmp_path: Path
) -> None:
    members = experts(tmp_path, model_type)
    recipe = {"router_init": "text", "router_tokens": tokens, "router_logit_std": logit_std}
    moe = Checkpoint.open(mixed(list(members), tmp_path / "moe", **recipe))
    for layer, rows in enumerate(expected_rows(tmp_path / "0", ffn, tokens, logit_std)):
        found = moe.read(f"model.layers.{layer}.{gate}.weight")
        assert np.abs(found - rows).max() <= 1e-5 * np.abs(rows).max()


def test_padding_would_be_seen(tmp_path: Path) -> None:
    """The tolerance can fail: one more token in a text moves the rows far more."""
    rows = expected_rows(model(tmp_path / "0"), "mlp", "all", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.PROMPTS", (*PROMPTS[:2], ("1 + 1 = 2\0",)))
        other = expected_rows(tmp_path / "0", "mlp", "all", 1.0)
    assert all(np.abs(a - b).max() > 1e-3 * np.abs(a).max() for a, b in zip(rows, other, strict=True))


def test_many_passes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = experts(tmp_path)
    recipe = BtxRecipe(members, router_init="text")
    found = []
    for tokens in (16_384, 20):
        monkeypatch.setattr(statistics, "PASS_TOKENS", tokens)
        source = statistics.router_statistics(
            Checkpoint.open(tmp_path / "0"), members, recipe, (0, 2), tmp_path / str(tokens)
        )
        assert source.file is not None
        found.append(load_file(source.file))
    assert found[0].keys() == {"layers.0.router", "layers.2.router"}
    for name, rows in found[0].items():
        np.testing.assert_allclose(rows, found[1][name], rtol=0, atol=1e-5 * np.abs(rows).max())


def test_embeddings_are_means_of_normalised_token_embeddings(tmp_path: Path) -> None:
    members = experts(tmp_path)
    moe = Checkpoint.open(mixed(list(members), tmp_path / "moe", router_init="embedding", layers="all"))
    table = Checkpoint.open(tmp_path / "0").read("model.embed_tokens.weight").astype(np.float64)
    table /= np.sqrt((table**2).mean(axis=1, keepdims=True))

    def vectors(texts: tuple[str, ...]) -> np.ndarray:
        return table[list("".join(texts).encode())]

    rows = np.stack([vectors(texts).mean(axis=0) for texts in PROMPTS])
    rows[1] -= vectors(NEGATIVE[1]).mean(axis=0)
    rows -= rows.mean(axis=0)
    logits = np.concatenate([vectors(texts) for texts in PROMPTS]) @ rows.T
    rows /= np.sqrt(np.mean(np.var(logits, axis=1)))
    for layer in range(3):
        found = moe.read(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        assert np.abs(found - rows).max() <= 1e-5 * np.abs(rows).max()


def test_parts_of_one_ffn_share_its_row(tmp_path: Path) -> None:
    members = list(experts(tmp_path))
    whole = Checkpoint.open(mixed(members, tmp_path / "whole", router_init="text"))
    cut = Checkpoint.open(mixed(members, tmp_path / "cut", router_init="text", split=2))
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert (np.repeat(whole.read(name), 2, axis=0) == cut.read(name)).all()


def test_a_shared_gate_gets_its_row_too(tmp_path: Path) -> None:
    members = experts(tmp_path, "qwen2")
    shared = Expert(members[0].model, prompts=("any text",))
    moe = mixed(list(members), tmp_path / "moe", router_init="text", shared_expert=shared)
    (seen,) = [seen_by_routers(tmp_path / "0", "mlp", "any text")[1]]
    row = seen.mean(axis=0)
    row /= np.sqrt(np.mean((seen @ row) ** 2))
    found = Checkpoint.open(moe).read("model.layers.1.mlp.shared_expert_gate.weight")
    assert np.abs(found - row).max() <= 1e-5 * np.abs(row).max()


def test_data_is_read_as_every_command_reads_it(tmp_path: Path) -> None:
    texts = statistics.texts_of(Expert("x", data=("builtin:code",), prompts=("first",)))
    assert texts.positive[0] == "first" and len(texts.positive) == statistics.MAX_DOCUMENTS + 1
    assert texts.positive[1] == next(iter(read_documents(["builtin:code"], "train"))).text


def test_statistics_are_kept_and_are_part_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run takes them from the file; other texts are another file and another plan."""
    members = experts(tmp_path)
    recipe = BtxRecipe(members, router_init="text")
    first = plan_btx(open_models(recipe), recipe, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    assert first.recipe["statistics"] == first.sources[-1].commit

    def never(*_args: Any) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_router_inputs", never)
        assert plan_btx(open_models(recipe), recipe, tmp_path / "kept").fingerprint == first.fingerprint
    assert plan_btx(open_models(recipe), recipe, tmp_path / "elsewhere").fingerprint == first.fingerprint
    other = BtxRecipe((*members[:2], Expert(members[2].model, prompts=("2 + 2",))), router_init="text")
    assert plan_btx(open_models(other), other, tmp_path / "kept").fingerprint != first.fingerprint
    assert len(list((tmp_path / "kept").iterdir())) == 2
    tensors = load_file(kept)
    assert all(rows.shape == (3, 64) and rows.dtype == np.float32 for rows in tensors.values())
    fingerprint = json.loads((mixed(list(members), tmp_path / "moe", router_init="text") / "moectl.json").read_text())
    assert fingerprint["fingerprint"] == first.fingerprint


@pytest.mark.parametrize("how", ["text", "embedding"])
def test_texts_that_decide_nothing_are_refused(how: str, tmp_path: Path) -> None:
    path = str(model(tmp_path / "0"))
    with pytest.raises(UsageError, match="same texts"):
        mixed([Expert(path, prompts=("a",)), Expert(path, prompts=("a",))], tmp_path / "out", router_init=how)
    with pytest.raises(UsageError, match="look the same to the router of layer 0"):
        pair = [Expert(path, prompts=("ab",)), Expert(path, prompts=("ab", "ab"))]
        mixed(pair, tmp_path / "out", router_init=how)
    with pytest.raises(InputError, match="expert 1 hold no token"):
        mixed([Expert(path, prompts=("a",)), Expert(path, prompts=("",))], tmp_path / "out", router_init=how)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "0")
    pair = [Expert(str(tmp_path / "0"), prompts=(text,)) for text in "ab"]
    with pytest.raises(InputError, match="no tokenizer that transformers can use"):
        mixed(pair, tmp_path / "out", router_init="text")
    byte_tokenizer().save_pretrained(tmp_path / "0")
    pair = [Expert(str(tmp_path / "0"), prompts=(text,)) for text in ("a", "é")]
    with pytest.raises(InputError, match="gives token 195, its vocab_size is 128"):
        mixed(pair, tmp_path / "out", router_init="text")


def test_what_the_tokenizer_adds_is_read_and_not_counted(tmp_path: Path) -> None:
    """A first token that every text has says nothing about any, and in many a model has by far the largest vector."""
    path = model(tmp_path / "0")
    document = json.loads((path / "tokenizer.json").read_text())
    sequence = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special,
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    members = [Expert(str(path), prompts=("ab",)), Expert(str(path), prompts=("cde",))]
    found = Checkpoint.open(mixed(members, tmp_path / "moe", router_init="text"))
    dense, seen = reload(path), []
    dense.model.layers[0].mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, 1:].numpy()))
    with torch.no_grad():
        for text in ("ab", "cde"):
            dense(torch.tensor([[256, *text.encode()]]))
    rows = np.stack([each.mean(axis=0) for each in seen])
    rows -= rows.mean(axis=0)
    rows /= np.sqrt(np.mean(np.var(np.concatenate(seen) @ rows.T, axis=1)))
    assert np.abs(found.read("model.layers.0.block_sparse_moe.gate.weight") - rows).max() <= 1e-5 * np.abs(rows).max()
