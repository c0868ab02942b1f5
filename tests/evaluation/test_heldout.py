"""Held-out loss is the loss transformers computes, on text that training never reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moectl.data.documents import read_documents
from moectl.data.tokens import token_batches
from moectl.errors import InputError
from moectl.evaluation.heldout import heldout_batches, heldout_loss

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5, initializer_range=0.5))


def ids(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (rows, 12))


def encode(text: str) -> list[int]:
    return list(text.encode())


def batches_of(*specs: str, length: int = 32, most: int = 3) -> dict[str, list[np.ndarray]]:
    return heldout_batches(specs, encode, eos_id=256, sequence_length=length, batch_size=4, max_batches=most)


def test_it_is_the_loss_of_transformers_over_all_rows_at_once(llama: Any) -> None:
    """Batches of unequal size: the mean of their means would not do."""
    batches = {"a": [ids(0, 5), ids(1, 2)], "b": [ids(2, 1)]}
    loss = heldout_loss(llama, batches)
    llama.eval()
    for domain, of_domain in batches.items():
        every = torch.from_numpy(np.concatenate(of_domain))
        with torch.no_grad():
            assert loss[domain] == pytest.approx(llama(input_ids=every, labels=every).loss.item(), rel=1e-5)
    assert loss["mean"] == pytest.approx((loss["a"] + loss["b"]) / 2)
    assert list(loss) == ["a", "b", "mean"]


def test_a_balancing_loss_is_no_part_of_it() -> None:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 10.0}
    moe = MixtralForCausalLM(MixtralConfig(**SHAPE, **experts, output_router_logits=True)).eval()
    tokens = ids(0, 2)
    labels = torch.from_numpy(tokens)
    with torch.no_grad():
        balanced = moe(input_ids=labels, labels=labels)
    loss = heldout_loss(moe, {"a": [tokens]})["a"]
    assert loss == pytest.approx((balanced.loss - 10.0 * balanced.aux_loss).item(), rel=1e-4)
    assert balanced.loss.item() > loss + 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(llama: Any, training: bool) -> None:
    llama.train(training)
    first = heldout_loss(llama, {"a": [ids(0, 2)]})
    assert heldout_loss(llama, {"a": [ids(0, 2)]}) == first, "no dropout"
    assert llama.training is training
    assert all(parameter.grad is None for parameter in llama.parameters())
    with pytest.raises(IndexError):
        heldout_loss(llama, {"a": [ids(0, 2) + 64]})
    assert llama.training is training, "also after an error"


def test_a_model_that_knows_nothing_has_the_loss_of_a_guess(llama: Any) -> None:
    blank = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert heldout_loss(blank, {"a": [ids(0, 3)]})["mean"] == pytest.approx(math.log(64))


def test_heldout_text_and_training_text_are_disjoint() -> None:
    specs = ["builtin:arithmetic"]
    heldout = np.concatenate(batches_of(*specs, length=64, most=10_000)["arithmetic"]).flatten()
    packed = token_batches(read_documents(specs, "train"), encode, eos_id=256, sequence_length=64, batch_size=4)
    training = np.concatenate(list(packed)).flatten()
    documents = [{tuple(piece) for piece in np.split(ids, np.flatnonzero(ids == 256))} for ids in (heldout, training)]
    assert len(documents[0]) > 300 and len(documents[1]) > 3000
    assert not documents[0] & documents[1]


def test_every_domain_has_its_own_batches_up_to_a_limit() -> None:
    batches = batches_of("builtin:arithmetic", "builtin:prose", most=2)
    assert list(batches) == ["arithmetic", "prose"]
    assert all([batch.shape for batch in of_domain] == [(4, 32)] * 2 for of_domain in batches.values())


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(20)))
    with pytest.raises(InputError, match="'few' is shorter than one sequence of 1000 tokens"):
        batches_of(str(tmp_path / "few.jsonl"), length=1000)


def test_a_domain_cannot_be_called_mean(llama: Any) -> None:
    with pytest.raises(InputError, match="called 'mean'"):
        heldout_loss(llama, {"mean": [ids(0, 1)]})
