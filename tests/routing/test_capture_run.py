"""A routing run over documents: every token in its place, counted once, whatever the batches, streams and processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from installed import installed

from moectl.checkpoint.source import Checkpoint
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.errors import InputError, UsageError
from moectl.evaluation.compare import load
from moectl.families.tiny_moe import tiny_moe
from moectl.routing.recorder import sampled_documents
from moectl.routing.run import Settings, record
from moectl.traces.statistics import statistics_of
from moectl.traces.store import Recording
from moectl.traces.trace import DECODE, PREFILL

LENGTH = 24
DATA = {
    "letters": ["a", "the quick brown fox jumps over the lazy dog, twice", "pack my box", "five dozen liquor jugs now"],
    "numbers": ["1 + 2 = 3; 20 + 22 = 42; 300 + 33 = 333; 1 - 1 = 0", "12", "7 * 6 = 42 and no more"],
}


def save(model_type: str, directory: Path, **overrides: Any) -> Checkpoint:
    """A tiny model on disk that reads bytes."""
    model = tiny_moe(model_type, vocab_size=264, **overrides)
    model.config.eos_token_id, model.config.bos_token_id = BYTE_EOS_ID, None
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return Checkpoint.open(str(directory))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains of short documents."""
    directory = tmp_path_factory.mktemp("data")
    for domain, texts in DATA.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / f"{domain}.jsonl").write_text("".join(lines))
    return [str(directory / f"{domain}.jsonl") for domain in DATA]


def settings(**changes: Any) -> Settings:
    return Settings(**{"sequence_length": LENGTH, "batch_tokens": 64} | changes)


def documents_of(recording: Recording) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Domain, text and mask [T] of each document in a trace."""
    tokens = recording.trace.tokens
    found = []
    for number in np.unique(tokens.document_T):
        mask_T = tokens.document_T == number
        assert np.array_equal(tokens.position_T[mask_T], np.arange(mask_T.sum()))
        text = bytes(tokens.token_T[mask_T].astype(np.uint8)).decode()
        found.append((tokens.domains[tokens.domain_N[number]], text, mask_T))
    return found


def test_every_token_is_where_the_model_sends_it_alone(mixtral: Checkpoint, data: list[str]) -> None:
    """Against transformers' own router logits and predictions, one row at a time without padding."""
    recording = record(mixtral, data, settings())["decoder"]
    found = documents_of(recording)
    assert Counter((domain, text) for domain, text, _ in found) == Counter(
        (domain, text) for domain, texts in DATA.items() for text in texts
    )
    assert recording.sampled == 1
    model = load(mixtral)
    for _domain, text, mask_T in found:
        ids = list(text.encode())
        for start in range(0, len(ids), LENGTH):
            row = torch.tensor([[BYTE_EOS_ID, *ids[start : start + LENGTH]]])
            with torch.no_grad():
                output = model(row, output_router_logits=True)
            at = np.flatnonzero(mask_T)[start : start + LENGTH]
            assert recording.trace.tokens.predicted_T is not None
            assert np.array_equal(recording.trace.tokens.predicted_T[at], output.logits[0, 1:].argmax(-1))
            for routed, logits_TE in zip(recording.trace.layers, output.router_logits, strict=True):
                logits_TE = logits_TE.view(-1, 8)[1:]
                top = logits_TE.softmax(-1).topk(2, dim=-1)
                assert np.array_equal(routed.index_TK[at], top.indices)
                assert routed.weight_TK is not None and routed.score_TE is not None
                expected = top.values / top.values.sum(-1, keepdim=True)
                np.testing.assert_allclose(routed.weight_TK[at], expected, atol=1e-3)
                np.testing.assert_allclose(routed.score_TE[at], logits_TE, atol=5e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "llama4_text", "zaya", "jetmoe"])
def test_what_is_counted_is_what_the_trace_has(model_type: str, data: list[str], tmp_path: Path) -> None:
    """Counts on the way equal counts of the whole trace; sums of scores up to the trace's half precision."""
    check_counts(record(save(model_type, tmp_path), data, settings())["decoder"])


def check_counts(recording: Recording) -> None:
    found, expected = recording.statistics, statistics_of(recording.trace)
    assert found.tokens == expected.tokens == len(recording.trace)
    assert found.documents == expected.documents == sum(map(len, DATA.values()))
    assert np.array_equal(found.tokens_B, expected.tokens_B)
    for one, other in zip(found.loads, expected.loads, strict=True):
        assert one.point == other.point
        assert np.array_equal(one.count_BE, other.count_BE)
        assert np.array_equal(one.first_BE, other.first_BE)
        assert one.dropped == other.dropped
        assert one.weight_BE is not None and other.weight_BE is not None
        np.testing.assert_allclose(one.weight_BE, other.weight_BE, rtol=2e-3, atol=1e-3)
        if one.scored is not None:
            assert other.scored is not None
            np.testing.assert_allclose(one.scored.probability_E, other.scored.probability_E, rtol=5e-3, atol=1e-3)
            assert one.scored.entropy == pytest.approx(other.scored.entropy, rel=2e-3)
            assert one.scored.z == pytest.approx(other.scored.z, rel=2e-3, nan_ok=True)
            moved = np.abs(np.cumsum(one.scored.margin_M) - np.cumsum(other.scored.margin_M))
            assert one.scored.margin_M.sum() == len(recording.trace) and moved.max() <= 0.05 * len(recording.trace)


def test_counts_by_hand(mixtral: Checkpoint, data: list[str]) -> None:
    """Assignments, first choices and the violation of balance, token by token in plain Python."""
    recording = record(mixtral, data, settings(batch_tokens=1 << 20))["decoder"]
    for number, routed in enumerate(recording.trace.layers):
        load_ = recording.statistics.loads[number]
        count, first = Counter[int](), Counter[int]()
        for row in routed.index_TK:
            count.update(row.tolist())
            first[int(row[0])] += 1
        assert dict(enumerate(load_.count_E)) == {expert: count[expert] for expert in range(8)}
        assert dict(enumerate(load_.first_BE.sum(0))) == {expert: first[expert] for expert in range(8)}
        fair = len(routed.index_TK) * 2 / 8
        assert recording.statistics.max_vio_batch[number] == pytest.approx(max(count.values()) / fair - 1)


def test_batches_change_nothing(mixtral: Checkpoint, data: list[str]) -> None:
    """One row at a time, or everything at once and padded."""
    one, all_ = (record(mixtral, data, settings(batch_tokens=size))["decoder"] for size in (1, 4096))
    assert np.array_equal(one.trace.tokens.token_T, all_.trace.tokens.token_T)
    for mine, theirs in zip(one.trace.layers, all_.trace.layers, strict=True):
        assert np.array_equal(mine.index_TK, theirs.index_TK)


def test_the_sample_is_of_whole_documents_under_its_cap(mixtral: Checkpoint, data: list[str]) -> None:
    """And what is counted over all tokens is not sampled."""
    whole = record(mixtral, data, settings())["decoder"]
    per_token = 13 + 3 * (2 * 4 + 16)
    said: list[str] = []
    part = record(mixtral, data, settings(trace_bytes=80 * per_token, seed=3), say=said.append)["decoder"]
    assert 0 < len(part.trace) <= 80
    assert part.sampled == pytest.approx(len(part.trace) / len(whole.trace))
    texts = {text for texts in DATA.values() for text in texts}
    assert {text for _, text, _ in documents_of(part)} < texts
    assert np.array_equal(part.statistics.loads[1].count_BE, whole.statistics.loads[1].count_BE)
    assert f"The trace has {len(part.trace)} of {len(whole.trace)} tokens, in whole documents" in said[-1]


def test_sampled_documents() -> None:
    """Within the cap, another choice for another seed, every document as likely as another, never none."""
    length_N = np.array([3, 50, 7, 20, 11, 5, 31, 2])
    chosen = np.array([sampled_documents(length_N, 10, 600, seed) for seed in range(400)])
    assert ((chosen * length_N).sum(1) * 10 <= 600).all()
    assert len(np.unique(chosen, axis=0)) > 20
    assert (chosen.mean(0)[[0, 5, 7]] > 0.35).all()
    assert sampled_documents(length_N, 10, 0, 0).sum() == 1
    assert sampled_documents(length_N, 10, 10 * int(length_N.sum()), 0).all()


def test_generated_tokens_are_their_own_phase(mixtral: Checkpoint, data: list[str]) -> None:
    """Each document's first tokens, then the model's own likeliest ones, each routed as it was when it was read."""
    recording = record(mixtral, data, settings(generate=3, sequence_length=5))["decoder"]
    tokens, model = recording.trace.tokens, load(mixtral)
    assert recording.statistics.tokens == len(tokens)
    for number in np.unique(tokens.document_T):
        mask_T = tokens.document_T == number
        ids, prompt = tokens.token_T[mask_T], int((tokens.phase_T[mask_T] == PREFILL).sum())
        assert 1 <= prompt <= 5 and (tokens.phase_T[mask_T][prompt:] == DECODE).all() and len(ids) == prompt + 3
        with torch.no_grad():
            output = model(torch.tensor([[BYTE_EOS_ID, *ids]]), output_router_logits=True)
        assert np.array_equal(ids[prompt:], output.logits[0, prompt:-1].argmax(-1))
        for routed, logits_TE in zip(recording.trace.layers, output.router_logits, strict=True):
            assert np.array_equal(routed.index_TK[mask_T], logits_TE.view(-1, 8)[1:].topk(2, dim=-1).indices)


def test_one_layer_at_a_time_is_the_same(mixtral: Checkpoint, data: list[str]) -> None:
    """As for a model that is larger than memory."""
    whole, streamed = (record(mixtral, data, settings(layerwise=flag))["decoder"] for flag in (False, True))
    assert streamed.trace.tokens.predicted_T is None
    for mine, theirs in zip(whole.statistics.loads, streamed.statistics.loads, strict=True):
        assert mine.point == theirs.point
        assert np.array_equal(mine.count_BE, theirs.count_BE)


@pytest.mark.parametrize("model_type", installed("switch_transformers", "nllb-moe"))
def test_encoder_and_decoder_are_streams_of_their_own(model_type: str, data: list[str], tmp_path: Path) -> None:
    """Both read every document; what is dropped over capacity is counted."""
    recordings = record(save(model_type, tmp_path), data, settings())
    assert recordings.keys() == {"encoder", "decoder"}
    for stream, recording in recordings.items():
        assert {routed.point.role for routed in recording.trace.layers} == {stream}
        assert len(documents_of(recording)) == 7
        check_counts(recording)
    assert recordings["encoder"].trace.tokens.predicted_T is None


def test_our_own_experts_backend_and_no_scores(mixtral: Checkpoint, data: list[str]) -> None:
    recording = record(mixtral, data, settings(experts_implementation="moectl", scores=False, predicted=False))
    expected = record(mixtral, data, settings(experts_implementation="eager"))["decoder"]
    for mine, theirs in zip(recording["decoder"].trace.layers, expected.trace.layers, strict=True):
        assert mine.score_TE is None
        assert np.mean(mine.index_TK == theirs.index_TK) > 0.99
    assert all(load_.scored is None for load_ in recording["decoder"].statistics.loads)


def test_two_processes_share_the_documents(
    mixtral: Checkpoint, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them: the first has everything, in order; the other nothing."""
    alone = record(mixtral, data, settings())["decoder"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = (
        "import sys; from moectl.checkpoint.source import Checkpoint; from moectl.routing.run import Settings, record\n"
        f"settings = Settings(sequence_length={LENGTH}, batch_tokens=64)\n"
        "sys.exit(len(record(Checkpoint.open(sys.argv[1]), sys.argv[2:], settings)))"
    )
    command = [sys.executable, "-c", script, str(mixtral.path), *data]
    other = subprocess.Popen(command, env=os.environ | world | {"RANK": "1"})
    for name, value in (world | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    both = record(mixtral, data, settings())["decoder"]
    assert other.wait() == 0
    for name in ("token_T", "document_T", "position_T", "predicted_T"):
        assert np.array_equal(getattr(both.trace.tokens, name), getattr(alone.trace.tokens, name))
    for mine, theirs in zip(both.trace.layers, alone.trace.layers, strict=True):
        assert np.array_equal(mine.index_TK, theirs.index_TK)
    check_counts(both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 256}, "has 256 positions, too few"),
        ({"layerwise": True, "generate": 2}, "is to generate"),
        ({"experts_implementation": "none such"}, "cannot run"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str, mixtral: Checkpoint, data: list[str]) -> None:
    with pytest.raises(UsageError, match=message):
        record(mixtral, data, settings(**changes))


def test_nan_in_the_middle_of_a_run_is_named(data: list[str], tmp_path: Path) -> None:
    """By a token that the check before the run, on the first document, has not met."""
    model = tiny_moe("mixtral", vocab_size=264)
    model.config.eos_token_id = BYTE_EOS_ID
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("7")] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: the router's scores hold NaN or infinity"):
        record(Checkpoint.open(str(tmp_path)), data, settings())
