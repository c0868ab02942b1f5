"""`moectl train --dry-run` says what the run then does, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_training as models
import torch
from tiny_training import ONE
from torch.distributed.checkpoint import FileSystemReader
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.errors import InputError, UsageError
from moectl.training.adapters import open_source
from moectl.training.preview import Preview, preview
from moectl.training.routing import routed_source
from moectl.training.run import Facts, Reporting, Run, train
from moectl.training.world import World
from moectl.upcycle.pesc import Base, PescRecipe, plan_pesc


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {"dense": models.save_dense(root / "dense"), "moe": models.save_moe(root / "moe"), "pesc": root / "pesc"}
    found["tied"] = models.save_dense(root / "tied", tie_word_embeddings=True)
    recipe = PescRecipe(experts=4, adapter_dim=8, lora_rank=2)
    write(plan_pesc(Base.open(str(found["dense"])), recipe), found["pesc"])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return models.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}),
        ("tied", {}),
        ("moe", {"only": "router"}),
        ("moe", {"freeze_experts": True}),
        ("moe", {"router": "switch", "aux_loss": 0.0, "z_loss": 0.0, "only": "router"}),
        ("moe", {"router": "peer:heads=2,top_k=4", "aux_loss": 0.0, "z_loss": 0.0}),
        ("dense", {"router": "mod", "only": "router"}),
        ("pesc", {"only": "adapters"}),
        ("pesc", {"only": "experts"}),
    ],
)
def test_it_counts_what_the_run_has(
    name: str, options: dict[str, Any], tmp_path: Path, sources: dict[str, Path], data: tuple[str, str]
) -> None:
    """Against the run itself: its facts, its tensors in memory, its checkpoint's and its output's tensors."""
    source, recipe = open_source(str(sources[name])), models.recipe(data, steps=1, **options)
    told = preview(source, recipe, tmp_path / "out", ONE)
    assert not list(tmp_path.iterdir())
    run = Run(routed_source(source, recipe, tmp_path / "routed", ONE), recipe, tmp_path / "run", ONE)
    assert (told.parameters, told.trained, told.moe_layers) == (
        run.facts.parameters,
        run.facts.trained,
        run.facts.moe_layers,
    )
    run.advance()
    run.save()
    moments = [value for state in run.optimizer.state.values() for value in state.values() if value.ndim]
    assert told.weight_bytes == sum(weight.nbytes for weight in run.model.parameters())
    assert told.gradient_bytes == sum(weight.nbytes for weight in run.trained)
    assert told.optimizer_bytes == sum(moment.nbytes for moment in moments)
    saved = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000001").read_metadata().state_dict_metadata
    sizes = {
        key: each.size.numel() * 4 for key, each in saved.items() if hasattr(each, "size") and each.size.numel() > 1
    }
    shared = 4 * 258 * 64 if name == "tied" else 0  # the checkpoint has the one matrix under two names
    assert told.checkpoint_bytes == pytest.approx(sum(sizes.values()) - shared, abs=64)
    train(source, recipe, tmp_path / "out", ONE)
    made = tmp_path / "out" / ("adapter_model.safetensors" if name == "pesc" else "model.safetensors")
    assert told.output_bytes == Checkpoint.of_file(made).nbytes
    assert told.disk_bytes == told.output_bytes + 3 * told.checkpoint_bytes


def test_more_processes_share_the_model_but_not_the_adapter(
    tmp_path: Path, sources: dict[str, Path], data: tuple[str, str]
) -> None:
    def of(name: str, size: int) -> Preview:
        recipe = models.recipe(data, only="adapters" if name == "pesc" else "all")
        return preview(open_source(str(sources[name])), recipe, tmp_path / "out", World(0, size, torch.device("cpu")))

    one, two = of("moe", 1), of("moe", 2)
    assert (two.weight_bytes, two.optimizer_bytes) == (one.weight_bytes // 2, one.optimizer_bytes // 2)
    one, two = of("pesc", 1), of("pesc", 2)
    assert two.optimizer_bytes == one.optimizer_bytes
    assert two.weight_bytes - one.weight_bytes == -(one.weight_bytes - 4 * one.trained) // 2


def test_it_says_where_the_run_would_begin(tmp_path: Path, sources: dict[str, Path], data: tuple[str, str]) -> None:
    source, recipe, out = open_source(str(sources["moe"])), models.recipe(data, steps=3), tmp_path / "out"
    heard: list[Facts] = []

    def stop(_metrics: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert preview(source, recipe, out, ONE).resumed_from == 0
    train(source, recipe, out, ONE, reporting=Reporting(on_step=stop))
    assert preview(source, recipe, out, ONE).resumed_from == 1
    with pytest.raises(UsageError, match="unfinished"):
        preview(source, models.recipe(data, steps=4), out, ONE)
    train(source, recipe, out, ONE, reporting=Reporting(heard.append))
    assert heard[0].resumed_from == 1
    assert preview(source, recipe, out, ONE).complete
    beside = tmp_path / "out.partial"
    beside.mkdir()
    (beside / "mine.txt").touch()
    assert preview(source, recipe, out, ONE).complete, "what lies beside a complete output does not matter, as in train"
    shutil.rmtree(beside)
    with pytest.raises(UsageError, match="in one another"):
        preview(source, recipe, sources["moe"], ONE, overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        preview(source, models.recipe(data, steps=4), out, ONE)
    assert not preview(source, models.recipe(data, steps=4), out, ONE, overwrite=True).complete


def test_it_refuses_data_that_the_run_would_refuse(tmp_path: Path, sources: dict[str, Path]) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n')
    with pytest.raises(InputError, match="chat template"):
        preview(open_source(str(sources["moe"])), models.recipe((str(chat),)), tmp_path / "out", ONE)


def test_the_command_prints_it(tmp_path: Path, sources: dict[str, Path], data: tuple[str, str]) -> None:
    words = ["train", str(sources["pesc"]), "-o", str(tmp_path / "out"), "--data", f"{data[0]}:3", "--data", data[1]]
    words += ["--steps", "5", "--batch-size", "2", "--seq-len", "16", "--device", "cpu", "--dry-run"]
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert document["schema"] == "moectl.train.plan/1"
    assert (document["tokens_per_step"], document["tokens"], document["moe_layers"]) == (32, 160, 2)
    assert document["data"] == [{"domain": "numbers", "weight": 0.75}, {"domain": "words", "weight": 0.25}]
    table = CliRunner().invoke(app, words)
    assert f"parameters trained\t{document['trained']}\n" in table.stdout and "data: numbers\t75.0%" in table.stdout
    refused = CliRunner().invoke(app, [*words, "--only", "all"])
    assert isinstance(refused.exception, UsageError)
    assert not list(tmp_path.iterdir())
