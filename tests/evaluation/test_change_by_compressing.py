"""What compressing did, measured on checkpoints: equal to the parts it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.checkpoint.source import Checkpoint
from moectl.data.tokens import byte_tokenizer
from moectl.errors import InputError, MachineError
from moectl.evaluation import change as module
from moectl.evaluation.change import change
from moectl.evaluation.run import Settings, run
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet
from moectl.layerwise.whole import load

DATA = ("builtin:code", "builtin:arithmetic")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A tiny model that reads bytes, and one with other experts in its last layer."""
    made = []
    for name, scale in (("source", 1.0), ("made", 0.3)):
        path = tmp_path_factory.mktemp("change") / name
        model = tiny_moe("mixtral", vocab_size=258)
        with torch.no_grad():
            model.model.layers[-1].mlp.experts.down_proj *= scale
        with quiet():
            model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        made.append(Checkpoint.open(str(path)))
    return made[0], made[1]


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELDOUT_TOKENS", 1500)
    monkeypatch.setattr(module, "DRIFT_TOKENS", 512)


def test_losses_are_those_of_eval(pair: tuple[Checkpoint, Checkpoint]) -> None:
    found = change(*pair, DATA, load)
    paths = tuple(str(each.path) for each in pair)
    before, after = run(Settings(paths, DATA, max_tokens=1500, sequence_length=256)).results
    assert dict(found.before) == before
    for domain, each in found.after.items():
        assert each.loss == after[domain].loss and each.difference_interval == after[domain].difference_interval
    document = found.to_json()
    assert set(document["domains"]) == {"code", "arithmetic", "mean"} and len(document["rerouted"]) == 3
    drift = document["domains"]["code"]["drift"]
    assert drift["tokens"] == 512 and drift["kl"] > 0
    assert set(document["rerouted"].values()) == {0.0}, "only the last layer's experts are others"


def test_nothing_changed_is_nothing(pair: tuple[Checkpoint, Checkpoint]) -> None:
    found = change(pair[0], pair[0], DATA, load)
    assert all(each.difference == 0 for each in found.after.values())
    assert all(drift.kl == 0 and drift.same_next == 1 for drift in found.divergence.domains.values())


def test_logits_that_would_not_fit_a_file_are_fewer(
    pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 4 * 258 * 2 * 256)
    found = change(*pair, DATA, load)
    assert {name: drift.tokens for name, drift in found.divergence.domains.items()} == {
        "code": 256,
        "arithmetic": 256,
        "mean": 512,
    }


def test_what_cannot_be_measured_is_refused(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(MachineError, match="half of the free memory"):
        change(*pair, DATA, never)
    with quiet():
        tiny_moe("nllb-moe").save_pretrained(tmp_path / "switch")
    switch = Checkpoint.open(str(tmp_path / "switch"))
    with pytest.raises(InputError, match="encoder-decoder"):
        change(switch, switch, DATA, never)
