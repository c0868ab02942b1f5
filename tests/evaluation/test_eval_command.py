"""`moectl eval` side by side: a dense model, its MoE, an ensemble; pipes, gates and mistakes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.data.documents import split_of
from moectl.data.tokens import byte_tokenizer
from moectl.errors import InputError, MachineError, UsageError
from moectl.evaluation.run import Settings, run
from moectl.families.tiny import tiny_model
from moectl.layerwise.tokenizer import prefix, separator
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

WORDS = [f"Document {number}: {'naïve ' * (number % 7)}text." for number in range(400)]
HELDOUT = [text for text in WORDS if split_of(text) == "heldout"]
SIZES = {"vocab_size": 258, "eos_token_id": 256, "bos_token_id": None, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense models, the MoE of the first, one without a tokenizer, and data of two domains."""
    directory = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("one", "two", "mute")):
        tiny_model("llama", seed=seed, **SIZES).save_pretrained(directory / name)
        if name != "mute":
            byte_tokenizer().save_pretrained(directory / name)
    write(plan_sparse(Checkpoint.open(directory / "one"), SparseRecipe(experts=4)), directory / "moe")
    for name, texts in (("small", WORDS), ("large", WORDS[::-1])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return directory


def settings(place: Path, *models: str, **options: Any) -> Settings:
    given = {"data": (str(place / "small.jsonl"),), "max_tokens": 300, **options}
    return Settings(models=tuple(str(place / model) for model in models), **given)


def test_a_dense_model_its_moe_and_an_ensemble_side_by_side(place: Path) -> None:
    both = tuple(str(place / f"{name}.jsonl") for name in ("small", "large"))
    found = run(settings(place, "one", "moe", "two", data=both, max_tokens=10**6, ensemble=True, dtype="float32"))
    assert found.names == ["one", "moe", "two", "ensemble (uniform)", "ensemble (posterior)"]
    assert found.members == ["one", "two"], "a MoE is no expert of the ensemble"
    dense, moe, other, uniform, posterior = found.results
    assert found.documents == {"small": len(HELDOUT), "large": len(HELDOUT)}
    assert dense["small"].tokens == sum(len(text.encode()) for text in HELDOUT)
    assert abs(moe["mean"].difference) < 1e-5 and moe["small"].loss == pytest.approx(dense["small"].loss, abs=1e-5)
    assert dense["small"].bits_per_byte == pytest.approx(dense["small"].loss / math.log(2)), "a token is a byte"
    assert dense["small"].loss == pytest.approx(dense["large"].loss, abs=1e-5), "the same documents in another order"
    best, worst = sorted((dense["mean"].loss, other["mean"].loss))
    assert uniform["mean"].loss <= worst and posterior["mean"].loss <= worst
    assert uniform["mean"].loss <= (best + worst) / 2 + 1e-9, "log is concave"
    low, high = other["small"].difference_interval or (0, 0)
    assert low <= other["small"].difference <= high


@pytest.mark.parametrize("implementation", ["eager", "moectl"])
def test_implementations_of_experts_agree(place: Path, implementation: str) -> None:
    plain = run(settings(place, "moe")).results[0]["mean"].loss
    found = run(settings(place, "one", "moe", experts_implementation=implementation)).results[1]["mean"].loss
    assert found == pytest.approx(plain, abs=1e-5)


def test_shorter_windows_see_less_but_count_the_same(place: Path) -> None:
    whole, cut = (run(settings(place, "one", sequence_length=length)).results[0]["mean"] for length in (None, 4))
    assert whole.tokens == cut.tokens and whole.loss != cut.loss


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        (("one", "mute"), {}, InputError, "mute has no tokenizer"),
        (("one",), {"sequence_length": 65}, UsageError, "more than the 64 positions"),
        (("one",), {"device": "tpu"}, UsageError, "'tpu' is not known"),
        (("one",), {"dtype": "float8"}, UsageError, "'float8' is not known"),
        (("moe",), {"experts_implementation": "magic"}, UsageError, "magic cannot run moe"),
        (("one", "moe"), {"ensemble": True}, UsageError, "at least two models, and there are 1"),
        (("one", "two"), {"ensemble": True, "members": ("one", "three")}, UsageError, "'three' is none of the models"),
        (("one", "two"), {"ensemble": True, "members": ("one", "one")}, UsageError, "'one' is named twice"),
        (("one",), {"data": ("nowhere.jsonl",)}, InputError, "nowhere.jsonl"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(
    place: Path, models: tuple[str, ...], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(settings(place, *models, **options))


def test_an_encoder_decoder_is_refused(place: Path, tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="t5 is an encoder-decoder"):
        run(settings(place, str(tmp_path / "t5")))


def test_a_tokenizer_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="and its vocabulary has 100"):
        run(settings(place, str(tmp_path / "small")))


def test_tasks_go_through_the_harness(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has the harness's names and returns what it returns; the model it gets is ours."""
    seen: list[Any] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen.append(options)
        return {"results": {"arc": {"alias": "arc", "sample_len": 3, "acc,none": 0.25, "acc_stderr,none": 0.01}}}

    class Manager:
        def match_tasks(self, tasks: list[str]) -> list[str]:
            return [task for task in tasks if task == "arc"]

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: SimpleNamespace(**options)},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    found = run(settings(place, "one", data=(), tasks=("arc",), limit=3))
    assert found.tasks == [{"arc": {"acc": 0.25, "acc_stderr": 0.01}}] and found.results == []
    assert isinstance(seen[0]["model"].pretrained, torch.nn.Module) and seen[0]["limit"] == 3
    with pytest.raises(UsageError, match="no task riddles"):
        run(settings(place, "one", data=(), tasks=("riddles",)))


def test_without_the_harness_tasks_say_how_to_get_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MachineError, match="not installed") as refused:
        run(settings(place, "one", data=(), tasks=("arc",)))
    assert "moectl[eval]" in refused.value.fix


@pytest.mark.parametrize(
    ("tokenizer", "config", "between", "before"),
    [
        ((7, 8), {}, 7, 8),
        ((7, None), {}, 7, 7),
        ((None, 8), {"eos_token_id": [5, 6]}, 5, 8),
        ((None, None), {"bos_token_id": 4}, 4, 4),
        ((0, None), {"eos_token_id": 3}, 0, 0),
    ],
)
def test_ids_between_and_before_documents(
    tokenizer: tuple[int | None, int | None], config: dict[str, Any], between: int, before: int
) -> None:
    ids = SimpleNamespace(eos_token_id=tokenizer[0], bos_token_id=tokenizer[1])
    checkpoint: Any = SimpleNamespace(name="model", config=config)
    assert (separator(checkpoint, ids), prefix(checkpoint, ids)) == (between, before)


def test_without_any_such_id_a_model_is_refused() -> None:
    checkpoint: Any = SimpleNamespace(name="model", config={"eos_token_id": None})
    with pytest.raises(InputError, match="neither an end-of-text"):
        prefix(checkpoint, SimpleNamespace(eos_token_id=None, bos_token_id=None))


def shell(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=place,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_in_a_pipe_it_is_a_table_and_a_gate_exits_with_5(place: Path) -> None:
    done = shell("moectl eval one moe --data small.jsonl --fail-on 'small.loss>0.1' -q | cut -f 1-3", place)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["domain", "measure", "one"]
    table = {(domain, measure): float(value) for domain, measure, value in lines[1:]}
    low, loss, high = (table["small", name] for name in ("loss low", "loss", "loss high"))
    assert low < loss < high and table["small", "perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert table["mean", "difference"] == 0
    assert done.returncode == 5 and done.stderr.startswith("error: one: small.loss is")


def test_as_json_it_has_everything_and_a_mistake_exits_with_2(place: Path) -> None:
    arguments = ["--ensemble", "--data", str(place / "small.jsonl"), "--max-tokens", "200", "--json"]
    done = CliRunner().invoke(app, ["eval", str(place / "one"), str(place / "two"), *arguments])
    found = json.loads(done.stdout)
    assert found["schema"] == "moectl.eval/1" and [entry["name"] for entry in found["models"]][:2] == ["one", "two"]
    assert found["models"][2]["members"] == ["one", "two"] and done.exit_code == 0
    assert len(found["models"][1]["domains"]["small"]["difference_interval"]) == 2
    wrong = shell("moectl eval one --fail-on 'speed>1'", place)
    assert (wrong.returncode, wrong.stdout) == (2, "") and "is no condition" in wrong.stderr
