"""The quickstart's model is an ordinary checkpoint that has learnt something, the same for the same seed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moectl.training import byte_llama
from moectl.training.byte_llama import train_byte_llama


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_llama, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(byte_llama, "BATCH_SIZE", 8)


def test_it_trains_saves_and_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    place = tmp_path / "model"
    trained = train_byte_llama(place, steps=30, seed=0, on_step=lambda metrics: steps.append(metrics.step))
    assert steps == list(range(1, 31))
    assert capfd.readouterr() == ("", ""), "what is shown is the caller's"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the untrained model is gone"

    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    assert model.dtype == torch.float32 and (place / "model.safetensors").is_file()
    assert sum(parameter.numel() for parameter in model.parameters()) == 989_056
    assert trained.last is not None and trained.last.tokens == 30 * 64 * 8
    assert trained.last.loss < math.log(258) - 1.5, "far from a guess"

    prompt = tokenizer("def read(self", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("def read(self")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id
    assert model.config.bos_token_id is None


def test_a_seed_is_a_model(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_byte_llama(tmp_path / name, steps=2, seed=seed)
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
