"""Encoder-decoders are compressed: what they are calibrated on, and both of their stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from installed import needs
from pipeline_models import TWO_STACKS
from qmoe_runs import COUNTING, SMALL, compress, made_moe, memory, texts

from moectl.checkpoint.source import Checkpoint
from moectl.compress.calibration import Calibration
from moectl.compress.pipeline import preflight
from moectl.data.tokens import byte_tokenizer
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.pairs import model_inputs, sentinel_ids, spans_apart
from moectl.layerwise.quiet import quiet
from moectl.layerwise.tokenizer import load_tokenizer

START = 9
SENTINELS = 4
TEXT = np.arange(3, 67).reshape(2, 32)


def made(path: Path, family: str, sentinels: int = 0) -> Path:
    """A tiny model whose tokens are bytes and sentinels, the first of which has the largest id, as T5's has."""
    with quiet():
        sizes = {"vocab_size": 264, "decoder_start_token_id": START, "eos_token_id": 256}
        tiny_moe(family, **sizes).to(torch.bfloat16).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra_id_{number}>" for number in reversed(range(sentinels))], special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(preflight, "_SPEED_SECONDS", 0.0)
    with memory() as directory:
        yield directory


def put_back(source_S: np.ndarray, target_T: np.ndarray) -> list[int]:
    """The text, with ids below zero as sentinels."""
    spans: dict[int, list[int]] = {}
    for token in target_T.tolist():
        if token < 0:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    return [each for token in source_S.tolist() for each in (spans.pop(token) if token < 0 else [token])]


@given(st.integers(2, 700), st.integers(1, 40), st.integers(0, 9))
def test_spans_put_back_give_the_text(length: int, sentinels: int, seed: int) -> None:
    token_BL = np.arange(3 * length).reshape(3, length)
    marks = [-1 - number for number in range(sentinels)]
    sources, targets = spans_apart(token_BL, marks, seed)
    lost = max(1, round(0.15 * length))
    spans = min(max(1, round(lost / 3)), sentinels)
    assert sources.shape == (3, length - lost + spans) and targets.shape == (3, lost + spans)
    for token_L, source_S, target_T in zip(token_BL, sources, targets, strict=True):
        assert [token for token in source_S.tolist() if token < 0] == marks[:spans]
        assert [token for token in target_T.tolist() if token < 0] == marks[:spans]
        for ids in (source_S, target_T):
            assert not ((ids[1:] < 0) & (ids[:-1] < 0)).any(), "no span and nothing between spans is empty"
        assert put_back(source_S, target_T) == token_L.tolist()


def test_spans_are_elsewhere_in_every_text_and_the_same_every_time() -> None:
    token_BL = np.tile(np.arange(512), (200, 1))
    marks = [-1 - number for number in range(100)]
    sources, targets = spans_apart(token_BL, marks)
    again = spans_apart(token_BL, marks)
    assert np.array_equal(sources, again[0]) and np.array_equal(targets, again[1])
    assert not np.array_equal(sources, spans_apart(token_BL, marks, 1)[0])
    taken_N = np.bincount(targets[targets >= 0], minlength=512)[20:-20]
    assert taken_N.mean() == pytest.approx(0.15 * 200, rel=0.1) and 0 < taken_N.min() < taken_N.max() < 0.3 * 200


@needs("switch_transformers")
def test_sentinels_are_counted_from_their_names(room: Path) -> None:
    checkpoint = Checkpoint.open(made(room / "moe", "switch_transformers", SENTINELS))
    assert sentinel_ids(load_tokenizer(checkpoint)) == [261, 260, 259, 258]
    source_BS, target_BT = model_inputs(checkpoint, TEXT)
    assert source_BS.shape == (2, 32 - 5 + 2) and target_BT.shape == (2, 1 + 5 + 2)
    assert target_BT[:, :2].tolist() == [[START, 261]] * 2


@pytest.mark.parametrize("family", TWO_STACKS)
def test_without_sentinels_a_text_is_its_own_target(family: str, room: Path) -> None:
    source_BS, target_BT = model_inputs(Checkpoint.open(made(room / "moe", family)), TEXT)
    assert np.array_equal(source_BS, TEXT)
    assert np.array_equal(target_BT[:, 1:], TEXT[:, :-1]) and (target_BT[:, 0] == START).all()
    assert Calibration().about((source_BS, target_BT))["tokens"] == 2 * TEXT.size


def test_a_decoder_is_given_the_text_as_it_is(room: Path) -> None:
    made_moe(room / "moe")
    assert model_inputs(Checkpoint.open(room / "moe"), TEXT) is TEXT


@pytest.mark.parametrize("family", TWO_STACKS)
def test_both_stacks_are_coded_and_the_output_says_on_what(family: str, room: Path) -> None:
    model = made(room / "moe", family, SENTINELS)
    text = texts(room / "counting.jsonl", COUNTING)
    done = compress(model, room / "q", *SMALL[:-1], "--html", room / "page.html", data=text)
    assert done.exit_code == 0, done.exception
    assert "The model was not measured: The model is an encoder-decoder" in done.stderr
    assert ("runs experts 0 and 1 of NLLB-MoE" in done.stderr) == (family == "nllb-moe")
    made_of = json.loads((room / "q" / "moectl.json").read_text())["recipe"]["calibration"]
    assert {key: made_of[key] for key in ("samples", "seq_len", "target_len", "tokens")} == {
        "samples": 6,
        "seq_len": 29,
        "target_len": 8,
        "tokens": 6 * 37,
    }
    coded = [name for name in Checkpoint.open(room / "q").tensors if name.endswith(".counts")]
    assert {stack: any(stack in name for name in coded) for stack in ("encoder.", "decoder.")} == {
        "encoder.": True,
        "decoder.": True,
    }
    assert "AutoModelForSeq2SeqLM" in (room / "q" / "README.md").read_text()
    done = compress(model, room / "q", *SMALL[:-1], data=text)
    assert done.exit_code == 0 and "It was already complete." in done.stderr
