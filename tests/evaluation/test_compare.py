"""Comparing two checkpoints: exact when they are equal, sensitive when they are not, clear when it cannot be done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moectl.checkpoint.source import SINGLE, Checkpoint
from moectl.errors import InputError
from moectl.evaluation import compare as module
from moectl.evaluation.compare import Comparison, compare, default_tokens
from moectl.layerwise.quiet import quiet

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
WEIGHT = "model.layers.1.mlp.down_proj.weight"

WAYS = pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layerwise"])


def make(path: Path, model_type: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(model_type, **(SMALL | changes))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def variant(
    path: Path, to: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **config: Any
) -> Checkpoint:
    """A copy of a checkpoint with its tensors changed in place and fields of its config replaced."""
    shutil.copytree(path, to)
    (to / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, to / SINGLE, {"format": "pt"})
    return Checkpoint.open(to)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=100)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mixtral"), "mixtral", num_local_experts=4)


@WAYS
def test_equal_checkpoints_differ_by_exactly_nothing(mixtral: Path, tmp_path: Path, layerwise: bool) -> None:
    result = compare(variant(mixtral, tmp_path / "copy"), Checkpoint.open(mixtral), layerwise=layerwise)
    assert (result.max_abs, result.relative, result.kl, result.argmax_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert result.max_logit > 0
    assert result.layerwise is layerwise


@WAYS
def test_one_weight_off_by_a_thousandth_shows(mistral: Path, tmp_path: Path, layerwise: bool) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[WEIGHT].view(-1)
        flat[flat.abs().argmax()] *= 1.001

    result = compare(variant(mistral, tmp_path / "m", change), Checkpoint.open(mistral), layerwise=layerwise)
    assert 1e-5 < result.relative < 1e-2
    assert 0 < result.kl < 1e-5


@WAYS
def test_a_dropped_window_shows_at_the_default_length(mistral: Path, tmp_path: Path, layerwise: bool) -> None:
    full, windowed = variant(mistral, tmp_path / "full", sliding_window=None), Checkpoint.open(mistral)
    result = compare(full, windowed, layerwise=layerwise)
    assert result.tokens == 128
    assert result.relative > 1e-3
    assert compare(full, windowed, tokens=64, layerwise=layerwise).relative == 0


def test_both_ways_give_the_same_numbers(mixtral: Path, tmp_path: Path) -> None:
    noisy = variant(mixtral, tmp_path / "m", lambda tensors: tensors["lm_head.weight"].mul_(0.7))
    one, other = (compare(noisy, Checkpoint.open(mixtral), seed=3, layerwise=way) for way in (False, True))
    numbers = [
        [result.max_abs, result.max_logit, result.relative, result.argmax_agreement, result.kl]
        for result in (one, other)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert one.relative == pytest.approx(0.3, rel=1e-5)
    assert (one.tokens, one.seed) == (other.tokens, other.seed) == (64, 3)


def test_numbers_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the textbook formulas, in chunks of 3 of 10 rows."""
    generator = torch.Generator().manual_seed(0)
    actual, expected = (torch.randn(10, 7, generator=generator) for _ in range(2))
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 3 * 7)
    max_abs, agreement, kl = module._difference(actual, expected)
    p, q = expected.double().softmax(-1), actual.double().softmax(-1)
    assert max_abs == pytest.approx((actual.double() - expected.double()).abs().max().item(), rel=1e-12)
    assert agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-12)


def test_the_seed_chooses_the_tokens(mixtral: Path) -> None:
    model = Checkpoint.open(mixtral)
    first, again, other = (compare(model, model, tokens=8, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.max_logit != other.max_logit


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ([{}], 64),
        ([{"sliding_window": 16}], 64),
        ([{"sliding_window": 128}, {}], 144),
        ([{}, {"sliding_window": 4096}], 4112),
        ([{"attention_chunk_size": 100}], 128),
        ([{"sliding_window": 4096, "max_position_embeddings": 4096}, {"max_position_embeddings": 9000}], 4096),
        ([{"max_position_embeddings": 32}], 32),
    ],
)
def test_the_default_length_exceeds_every_window(fields: list[dict[str, int]], tokens: int) -> None:
    assert default_tokens(*(SimpleNamespace(**values) for values in fields)) == tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("free", [1 << 40, 1 << 10])
def test_models_too_large_for_memory_run_layerwise(mixtral: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    model = Checkpoint.open(mixtral)
    monkeypatch.setattr(module, "available_memory", lambda: free)
    assert compare(model, model, tokens=8).layerwise is (free < model.nbytes)


@WAYS
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors.pop(WEIGHT), WEIGHT),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra"),
        (lambda tensors: tensors.update({WEIGHT: torch.ones(3)}), WEIGHT),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_an_incomplete_model_is_refused_by_name(
    mistral: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str, layerwise: bool
) -> None:
    with pytest.raises(InputError) as caught:
        compare(variant(mistral, tmp_path / "broken", change), Checkpoint.open(mistral), layerwise=layerwise)
    assert "broken" in caught.value.what
    assert repr(name) in caught.value.what


@WAYS
def test_weights_that_are_not_numbers_are_refused(mistral: Path, tmp_path: Path, layerwise: bool) -> None:
    nan = variant(mistral, tmp_path / "m", lambda tensors: tensors[WEIGHT].fill_(torch.nan))
    with pytest.raises(InputError, match="NaN"):
        compare(nan, Checkpoint.open(mistral), layerwise=layerwise)
    zero = variant(mistral, tmp_path / "z", lambda tensors: tensors["lm_head.weight"].zero_())
    with pytest.raises(InputError, match="only zero"):
        compare(Checkpoint.open(mistral), zero, layerwise=layerwise)


def test_other_vocabularies_are_refused_with_both_sizes(mistral: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(make(tmp_path / "other", "mistral", vocab_size=80))
    with pytest.raises(InputError, match=r"80 tokens.* 96"):
        compare(other, Checkpoint.open(mistral))


@WAYS
def test_sequences_beyond_learned_positions_are_refused(tmp_path: Path, layerwise: bool) -> None:
    model = Checkpoint.open(make(tmp_path, "gpt2", n_embd=32, n_layer=2, n_head=4, max_position_embeddings=32))
    assert compare(model, model, layerwise=layerwise).tokens == 32
    with pytest.raises(InputError, match="33 tokens"):
        compare(model, model, tokens=33, layerwise=layerwise)


@WAYS
def test_nothing_is_printed(mixtral: Path, capfd: pytest.CaptureFixture[str], layerwise: bool) -> None:
    model = Checkpoint.open(mixtral)
    assert isinstance(compare(model, model, tokens=8, layerwise=layerwise), Comparison)
    assert capfd.readouterr() == ("", "")
