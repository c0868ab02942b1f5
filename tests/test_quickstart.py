"""`moectl quickstart` makes every model of the story and reports them all, here with a few short steps each."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moectl import quickstart
from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.errors import UsageError
from moectl.training import byte_llama
from moectl.training.metrics import Metrics

MODELS = ["seed", "code", "prose", "arithmetic", "average", "btx", *quickstart.COMPRESSED]
MODELS += ["ensemble (uniform)", "ensemble (posterior)"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (byte_llama, quickstart):
        monkeypatch.setattr(module, "SEQUENCE_LENGTH", 64)
        monkeypatch.setattr(module, "BATCH_SIZE", 4)
    monkeypatch.setattr(quickstart, "SEQUENCES", 2)
    monkeypatch.setattr(quickstart, "HELDOUT_TOKENS", 512)
    monkeypatch.setattr(quickstart, "ROUTED_TOKENS", 512)
    monkeypatch.setattr(quickstart, "CALIBRATION_SEQUENCES", 4)


def test_it_makes_and_compares_every_model(tmp_path: Path) -> None:
    place = tmp_path / "story"
    steps = ["--seed-steps", "12", "--branch-steps", "3", "--moe-steps", "2"]
    result = CliRunner().invoke(app, ["quickstart", str(place), *steps, "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["schema"] == "moectl.quickstart/2"
    assert told["path"] == str(place / "btx") and told["tokens"] == (12 * 4 + (3 * 3 + 2) * 2) * 64
    assert 0 < told["max_logit_difference"] < 1e-3
    assert list(told["loss"]) == MODELS
    for loss in told["loss"].values():
        assert loss["mean"] == pytest.approx(sum(loss[domain] for domain in byte_llama.DOMAINS) / 3)
        assert loss["mean"] < math.log(258) + 0.2
    assert [sum(share[domain] for share in told["served"].values()) for domain in byte_llama.DOMAINS] == pytest.approx(
        [2.0] * 3
    ), "every byte has two experts of three"
    assert 4 < told["bits"]["btx-4-bits"] < 5 and 0 < told["bits"]["btx-ternary"] < 3
    opened = Checkpoint.open(place / "btx")
    assert verify_hashes(opened).ok and opened.model_type == "mixtral"
    assert AutoModelForCausalLM.from_pretrained(place / "btx").config.num_local_experts == 3
    assert "analyze-routing" in result.stderr

    with pytest.raises(UsageError, match="exists"):
        quickstart.quickstart(place, steps=quickstart.Steps(1, 1, 1), seed=0)
    (place / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="no directory"):
        quickstart.quickstart(place / "mine.txt", steps=quickstart.Steps(1, 1, 1), seed=0)
    with pytest.raises(UsageError) as caught:
        quickstart.quickstart(place, steps=quickstart.Steps(1, 1, 1), seed=0, overwrite=True)
    assert "holds more" in " ".join(caught.value.lines())
    assert (place / "mine.txt").read_text() == "kept" and (place / "seed").is_dir()


@pytest.mark.parametrize("step", [1, 3])
def test_a_story_that_is_interrupted_goes_on(step: int, tmp_path: Path) -> None:
    """In the seed's training, which has two steps, or in a branch's: no step is taken twice, none is left out."""
    heard: list[Metrics] = []

    def interrupt(metrics: Metrics) -> None:
        heard.append(metrics)
        if len(heard) == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        quickstart.quickstart(tmp_path / "story", steps=quickstart.Steps(2, 2, 1), seed=0, on_step=interrupt)
    assert len(heard) == step
    with pytest.raises(UsageError, match="exists"):
        quickstart.quickstart(tmp_path / "story", steps=quickstart.Steps(2, 2, 1), seed=1)
    if step == 3:
        quickstart.quickstart(tmp_path / "story", steps=quickstart.Steps(2, 2, 1), seed=0, on_step=interrupt)
        assert [metrics.step for metrics in heard] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
