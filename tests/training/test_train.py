"""`moectl train` in one process: what it computes, what it writes, and that an interruption changes no bit of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as models
import torch
from installed import needs
from plain_loop import train as plain_loop
from safetensors.torch import load_file, save_file
from tiny_training import ONE
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.data.mixture import mixture_rows
from moectl.errors import CheckFailed, InputError, MachineError, UsageError
from moectl.families.releases import RECORDS
from moectl.integrations.transformers import NAME
from moectl.training import run
from moectl.training.live import sparkline
from moectl.training.metrics import MetricsFile, read_metrics
from moectl.training.model import load_encoding
from moectl.training.recipe import TrainRecipe
from moectl.training.run import Reporting, train
from moectl.training.world import joined
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

PROGRAM = str(Path(sys.executable).with_name("moectl"))
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return models.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_moe(tmp_path_factory.mktemp("moe") / "moe")


def trained(path: Path, recipe: TrainRecipe, out: Path, **how: Any) -> Path:
    outcome = train(Checkpoint.open(path), recipe, out, ONE, **how)
    assert outcome.step == recipe.steps and outcome.signal is None
    return out


def test_an_upcycled_model_is_trained_saved_and_loads_completely(tmp_path: Path, data: tuple[str, str]) -> None:
    dense = models.save_dense(tmp_path / "dense")
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(experts=4, top_k=2, noise=0.01)), tmp_path / "moe")
    source = Checkpoint.open(tmp_path / "moe")
    recipe = models.recipe(data, steps=25)
    out = trained(source.path, recipe, tmp_path / "out")

    found = Checkpoint.open(out)
    assert {name: (ref.dtype, ref.shape) for name, ref in found.tensors.items()} == {
        name: (ref.dtype, ref.shape) for name, ref in source.tensors.items()
    }
    assert any(re.search(r"experts\.3\.w2\.weight$", name) for name in found.tensors), "one tensor per expert"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == source.config["architectures"]
    for side in source.side_files():
        assert (out / side.name).read_bytes() == side.read_bytes(), side.name
    assert AutoTokenizer.from_pretrained(out).encode("a b") == [97, 32, 98]
    assert verify_hashes(found).ok and not (tmp_path / "out.partial").exists()

    steps = read_metrics(out / "train" / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 26))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert all(len(step["load_cv"]) == len(step["max_vio"]) == 2 and step["mfu"] > 0 for step in steps)
    assert steps[-1]["tokens"] == 25 * 4 * 32
    moved = models.tensors(out)
    assert not any(torch.equal(tensor, moved[name]) for name, tensor in models.tensors(source.path).items())

    assert train(source, recipe, out, ONE).already
    with pytest.raises(UsageError, match="exists"):
        train(source, replace(recipe, seed=1), out, ONE)
    trained(source.path, replace(recipe, steps=1), out, overwrite=True)
    assert len(read_metrics(out / "train" / "metrics.jsonl")) == 1


def test_without_router_losses_it_is_the_plain_loop(tmp_path: Path, data: tuple[str, str]) -> None:
    """`loop.train`, which is tested against AdamW written out, on the same batches: accumulation changes nothing."""
    path = models.save_dense(tmp_path / "dense")
    recipe = models.recipe(data, steps=5, warmup=1, min_rate=0.0, batch_size=6, accumulate=3)
    out = trained(path, recipe, tmp_path / "out")
    rows = mixture_rows(
        recipe.parts, lambda text: list(text.encode()), eos_id=256, sequence_length=32, seed=recipe.seed
    )
    batches = [np.stack([row.token_L for row in islice(rows, 6)]) for _ in range(5)]
    model = AutoModelForCausalLM.from_pretrained(path)
    losses = plain_loop(model, batches, steps=5, learning_rate=3e-3, warmup=1)
    found = [step["loss"] for step in read_metrics(out / "train" / "metrics.jsonl")]
    assert found == pytest.approx(losses, rel=1e-5)
    expected = dict(model.named_parameters())
    for name, tensor in models.tensors(out).items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-3, atol=3e-5, msg=name)


def test_the_loss_on_answers_is_that_of_transformers_with_masked_labels(tmp_path: Path) -> None:
    path = models.save_dense(tmp_path / "dense")
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    line = '{"messages": [{"role": "user", "content": "a b c%d"}, {"role": "assistant", "content": "D E%d"}]}\n'
    data = tmp_path / "talk.jsonl"
    data.write_text("".join(line % (number, number) for number in range(80)))
    out = trained(path, models.recipe((str(data),), steps=1), tmp_path / "out")
    encoding = load_encoding(Checkpoint.open(path), chat=True)
    rows = mixture_rows(
        models.recipe((str(data),)).parts,
        encoding.encode,
        eos_id=256,
        sequence_length=32,
        seed=0,
        encode_chat=encoding.encode_chat,
    )
    batch = list(islice(rows, 4))
    tokens = torch.from_numpy(np.stack([row.token_L for row in batch]))
    labels = tokens.masked_fill(~torch.from_numpy(np.stack([row.learnt_L for row in batch])), -100)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(input_ids=tokens, labels=labels).loss.item()
    found = read_metrics(out / "train" / "metrics.jsonl")[0]["loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - AutoModelForCausalLM.from_pretrained(path)(input_ids=tokens, labels=tokens).loss.item()) > 1e-3


def test_what_is_frozen_stays_and_the_router_has_its_own_rate(tmp_path: Path, moe: Path, data: tuple[str, str]) -> None:
    before = models.tensors(moe)
    for name, options, moves in (
        ("frozen", {"freeze_experts": True}, lambda tensor: ".experts." not in tensor),
        ("experts", {"only": "experts"}, lambda tensor: ".experts." in tensor),
        ("router", {"only": "router", "router_rate": 0.5}, lambda tensor: ".gate." in tensor and "proj" not in tensor),
    ):
        out = trained(moe, models.recipe(data, steps=2, warmup=0, **options), tmp_path / name)
        for tensor, value in models.tensors(out).items():
            assert torch.equal(value, before[tensor]) != moves(tensor), (name, tensor)
    last = read_metrics(tmp_path / "router" / "train" / "metrics.jsonl")[0]
    assert last["router_lr"] == last["lr"] == 0.5
    of_experts = read_metrics(tmp_path / "experts" / "train" / "metrics.jsonl")[0]
    assert of_experts["lr"] == models.recipe(data).learning_rate, "the rate of what is trained, where the rest is not"
    moved = models.tensors(tmp_path / "router")["model.layers.0.mlp.gate.weight"]
    assert (moved - before["model.layers.0.mlp.gate.weight"]).abs().max() > 0.3, "Adam's step is about its rate"


def test_the_balancing_loss_reaches_the_router(tmp_path: Path, data: tuple[str, str]) -> None:
    """Only the router learns, and only to balance: a lopsided start becomes more even than without the loss."""
    path = models.save_moe(tmp_path / "moe")
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"][:2] *= 4
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found = {}
    for weight in (0.0, 10.0):
        options = {"steps": 25, "only": "router", "learning_rate": 0.02, "z_loss": 0.0, "clip": 1e9}
        out = trained(path, models.recipe(data, aux_loss=weight, **options), tmp_path / f"out{weight}")
        steps = read_metrics(out / "train" / "metrics.jsonl")
        found[weight] = sum(steps[-1]["load_cv"]), steps[-1]["aux"]
    assert found[10.0][0] < 0.7 * found[0.0][0] and found[10.0][1] < found[0.0][1]


@needs("deepseek_v3", since=RECORDS)
def test_selection_biases_move_by_their_rate_and_are_saved(tmp_path: Path, data: tuple[str, str]) -> None:
    path = models.save_moe(tmp_path / "moe", "deepseek_v3", num_hidden_layers=3)
    recipe = models.recipe(data, steps=3, warmup=0, aux_loss=0.0, bias_update=0.01)
    out = trained(path, recipe, tmp_path / "out", save_every=1)
    before, after = models.tensors(path), models.tensors(out)
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        steps = (after[name] - before[name]) / 0.01
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert 1 <= steps.abs().max().round() <= 3
    assert AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] in ([], set())


def test_bfloat16_trains_float32_weights(tmp_path: Path, moe: Path, data: tuple[str, str]) -> None:
    recipe = models.recipe(data, steps=4, warmup=0)
    theirs = trained(moe, recipe, tmp_path / "theirs")
    wide, narrow = (
        trained(moe, replace(recipe, dtype=dtype, implementation=NAME), tmp_path / dtype)
        for dtype in ("float32", "bfloat16")
    )
    losses = [[step["loss"] for step in read_metrics(out / "train" / "metrics.jsonl")] for out in (wide, narrow)]
    assert [s["loss"] for s in read_metrics(theirs / "train" / "metrics.jsonl")] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in models.tensors(narrow).values())


def test_a_loss_that_is_not_finite_names_step_data_and_checkpoint(tmp_path: Path, data: tuple[str, str]) -> None:
    """One embedding is NaN; the step named is the first whose sequences hold that byte."""
    path = models.save_moe(tmp_path / "moe")
    recipe = models.recipe(data, steps=40, accumulate=1)
    rows = mixture_rows(recipe.parts, lambda text: list(text.encode()), eos_id=256, sequence_length=32, seed=0)
    first_step: dict[int, int] = {}
    for step in range(1, 9):
        for row in islice(rows, 4):
            first_step |= {int(byte): first_step.get(int(byte), step) for byte in row.token_L}
    byte, first = max(first_step.items(), key=lambda item: item[1])
    assert first > 1
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][byte] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed) as stop:
        train(Checkpoint.open(path), recipe, tmp_path / "out", ONE, save_every=1)
    lines = stop.value.lines()
    assert f"nan at step {first} of 40, sequences {4 * first - 4} to {4 * first - 1}" in lines[0]
    assert f"step-{first - 1:08}" in lines[1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused(tmp_path: Path, moe: Path, data: tuple[str, str]) -> None:
    for wrong in (
        {"batch_size": 5},
        {"schedule": "sine"},
        {"dtype": "int8"},
        {"clip": 0.0},
        {"only": "nothing"},
        {"learning_rate": math.inf},
        {"router_rate": -1e-3},
        {"z_loss": math.nan},
    ):
        with pytest.raises(UsageError):
            train(Checkpoint.open(moe), models.recipe(data, **wrong), tmp_path / "out", ONE)
    with pytest.raises(UsageError, match="3 processes"):
        models.recipe(data).check_processes(3)
    with pytest.raises(InputError, match="does not exist"):
        train(Checkpoint.open(moe), models.recipe(("no.jsonl",)), tmp_path / "out", ONE)
    assert not (tmp_path / "out.partial").exists(), "nothing is left that would refuse the next command"
    for out in (moe, moe.parent, moe / "trained"):
        with pytest.raises(UsageError, match="in one another"):
            train(Checkpoint.open(moe), models.recipe(data), out, ONE, overwrite=True)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="another command"):
        train(Checkpoint.open(moe), models.recipe(data), tmp_path / "mine", ONE)


def test_a_metrics_file_forgets_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("text", ["my thesis\n", '{"text": "a document"}\n', "[1]\n"])
def test_a_file_of_something_else_is_not_written_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="something else"):
        MetricsFile(path, 0)
    assert path.read_text() == text


def test_processes_that_cannot_meet_are_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(MachineError, match="could not join"), joined("cpu"):
        pass


def test_a_sparkline_fits() -> None:
    assert sparkline([0.0, 0.5, 1.0, 7.0]) == "▁▅██" and sparkline([]) == ""
    assert len(sparkline([0.1] * 100)) <= 25


# ---- interruptions ------------------------------------------------------------------------------------------


def command(moe: Path, data: tuple[str, str], out: Path) -> list[str]:
    recipe = models.recipe(data, steps=STEPS)
    words: dict[str, Any] = {
        "steps": recipe.steps,
        "batch-size": recipe.batch_size,
        "seq-len": recipe.sequence_length,
        "accumulate": recipe.accumulate,
        "lr": recipe.learning_rate,
        "warmup": recipe.warmup,
        "z-loss": recipe.z_loss,
        "save-every": 10,
        "device": "cpu",
    }
    options = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    return [PROGRAM, "train", str(moe), "-o", str(out), *(w for spec in data for w in ("--data", spec)), *options]


def interrupt(words: list[str], out: Path, step: int, number: int) -> tuple[int, str, str]:
    """Start a training, send it a signal once it has logged `step`, and return how it ended."""
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out.with_name(out.name + ".partial") / run.METRICS
    while child.poll() is None and not any(line["step"] >= step for line in read_metrics(metrics)):
        time.sleep(0.01)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=300)
    return child.returncode, stdout, stderr


def test_sigterm_and_sigkill_change_no_bit(tmp_path: Path, moe: Path, data: tuple[str, str]) -> None:
    recipe = models.recipe(data, steps=STEPS)
    undisturbed = trained(moe, recipe, tmp_path / "undisturbed", save_every=10)
    out = tmp_path / "out"
    code, stdout, stderr = interrupt(command(moe, data, out), out, 4, signal.SIGTERM)
    assert (code, stdout) == (143, "") and "same command resumes" in stderr
    partial = tmp_path / "out.partial"
    saved = (partial / "checkpoints" / "latest").read_text()
    logged = read_metrics(partial / run.METRICS)[-1]["step"]
    assert saved == f"step-{logged:08}\n" and 4 <= logged < STEPS, "it saved where it stopped"

    code, stdout, _ = interrupt(command(moe, data, out), out, logged + 13, signal.SIGKILL)
    assert (code, stdout) == (-signal.SIGKILL, "") and not out.exists()
    resumed = []
    with pytest.raises(UsageError, match="another command"):
        train(Checkpoint.open(moe), replace(recipe, seed=1), out, ONE)
    trained(moe, recipe, out, save_every=10, reporting=Reporting(lambda facts: resumed.append(facts.resumed_from)))
    assert logged < resumed[0] < STEPS
    assert models.equal(out, undisturbed)
    numbers = [
        [{key: step[key] for key in ("step", "loss", "aux", "z", "grad_norm", "lr", "load_cv")} for step in steps]
        for steps in (read_metrics(path / "train" / "metrics.jsonl") for path in (out, undisturbed))
    ]
    assert numbers[0] == numbers[1]


def test_another_order_of_the_data_would_be_seen(
    tmp_path: Path, moe: Path, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: a resumed run that begins the data at its first sequence again ends with other bits."""
    recipe = models.recipe(data, steps=6)
    undisturbed = trained(moe, recipe, tmp_path / "undisturbed")

    def stop_at(step: int) -> Reporting:
        return Reporting(on_step=lambda metrics: os.kill(os.getpid(), signal.SIGTERM) if metrics.step == step else None)

    for planted in (False, True):
        out = tmp_path / f"planted-{planted}"
        stopped = train(Checkpoint.open(moe), recipe, out, ONE, reporting=stop_at(3))
        assert (stopped.step, stopped.signal) == (3, signal.SIGTERM)
        if planted:
            monkeypatch.setattr(run, "mixture_rows", lambda *a, skip, starts, **k: mixture_rows(*a, **k))
        trained(moe, recipe, out)
        assert models.equal(out, undisturbed) != planted


def test_checkpoints_are_kept_and_the_rest_goes(tmp_path: Path, moe: Path, data: tuple[str, str]) -> None:
    recipe = models.recipe(data, steps=9)
    root = tmp_path / "out.partial" / "checkpoints"
    seen = []

    def look(metrics: Any) -> None:
        seen.append(sorted(path.name for path in root.iterdir()) if root.exists() else [])

    trained(moe, recipe, tmp_path / "out", save_every=2, keep=2, reporting=Reporting(on_step=look))
    assert seen[1] == [] and seen[2] == ["latest", "step-00000002"]
    assert seen[-1] == ["latest", "step-00000006", "step-00000008"]


def test_branches_are_independent_trainings(tmp_path: Path, data: tuple[str, str]) -> None:
    """One process, one seed model, two domains: each the same as a training of its own, and found done again."""
    dense = models.save_dense(tmp_path / "dense")
    words = ["branch", str(dense), "-o", str(tmp_path / "out"), "--data", data[0], "--data", data[1]]
    words += ["--steps", "3", "--batch-size", "4", "--seq-len", "32", "--lr", "0.003", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    paths = [str(tmp_path / "out" / name) for name in ("numbers", "words")]
    assert done.stdout.splitlines() == paths
    recipe = TrainRecipe(data=(data[1],), steps=3, batch_size=4, sequence_length=32, learning_rate=0.003)
    assert models.equal(trained(dense, recipe, tmp_path / "alone"), Path(paths[1]))
    assert not models.equal(Path(paths[0]), Path(paths[1]))
    assert json.loads((Path(paths[0]) / "moectl.json").read_text())["recipe"]["data"] == [data[0]]
    again = CliRunner().invoke(app, [*words, "--domain", "words", "--json"])
    branches = json.loads(again.stdout)["branches"]
    assert [(branch["domain"], branch["already_complete"]) for branch in branches] == [("words", True)]
    assert CliRunner().invoke(app, [*words, "--domain", "letters"]).exit_code != 0
