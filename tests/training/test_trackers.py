"""`--log-to`: what TensorBoard and W&B are told, only when asked, by stand-ins that keep what they hear."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_training as models
from tiny_training import ONE

from moectl.errors import MachineError, UsageError
from moectl.training.adapters import open_source
from moectl.training.metrics import read_metrics
from moectl.training.run import train
from moectl.training.trackers import TRACKERS

HEARD: dict[str, Any] = {}


class Writer:
    """In the place of `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        HEARD.update(log_dir=Path(log_dir), purge_step=purge_step, scalars=[], open=True)
        (Path(log_dir)).mkdir(parents=True, exist_ok=True)
        (Path(log_dir) / "events").touch()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert HEARD["open"]
        HEARD["scalars"].append((step, name, value))

    def flush(self) -> None:
        HEARD["flushed"] = len(HEARD["scalars"])

    def close(self) -> None:
        HEARD["open"] = False


class Run:
    """In the place of a run of wandb."""

    def __init__(self, **given: Any) -> None:
        HEARD.update(given=given, logged=[], open=True)

    def log(self, numbers: dict[str, float], step: int) -> None:
        assert HEARD["open"]
        HEARD["logged"].append((step, numbers))

    def finish(self) -> None:
        HEARD["open"] = False


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Any, Any]:
    source = open_source(str(models.save_moe(tmp_path / "moe")))
    return source, models.recipe(models.write_data(tmp_path / "data"), steps=2)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of these names, in front of any that are installed."""
    for name in ("tensorboard", "wandb"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    writers = ModuleType("torch.utils.tensorboard")
    writers.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    HEARD.clear()


def test_tensorboard_hears_every_number_of_every_step(tmp_path: Path, inputs: Any, stand_ins: None) -> None:
    source, recipe = inputs
    out = tmp_path / "out"
    train(source, recipe, out, ONE, log_to=["tensorboard"])
    assert HEARD["log_dir"] == tmp_path / "out.partial" / "train" / "tensorboard" and HEARD["purge_step"] == 1
    assert (out / "train" / "tensorboard" / "events").exists() and not HEARD["open"]
    for line in read_metrics(out / "train" / "metrics.jsonl"):
        at = line.pop("step")
        heard = {name: value for step, name, value in HEARD["scalars"] if step == at}
        for name in ("load_cv", "max_vio"):
            line |= {f"{name}/{layer}": value for layer, value in enumerate(line.pop(name))}
        assert heard == line
    assert HEARD["flushed"] == len(HEARD["scalars"]), "a run that is killed has lost nothing that was told"
    assert "wandb" not in sys.modules, "nobody asked for it"


def test_wandb_goes_on_in_the_same_run(
    tmp_path: Path, inputs: Any, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = inputs
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run, __spec__=SimpleNamespace()))
    train(source, recipe, tmp_path / "out", ONE, log_to=["wandb"])
    given = HEARD["given"]
    assert (given["project"], given["name"], given["resume"]) == ("moectl", "out", "allow")
    assert given["config"] == recipe.to_json()
    assert [step for step, _ in HEARD["logged"]] == [1, 2] and not HEARD["open"]
    assert HEARD["logged"][1][1]["loss"] == read_metrics(tmp_path / "out" / "train" / "metrics.jsonl")[1]["loss"]

    train(source, recipe, tmp_path / "out", ONE, log_to=["wandb"], overwrite=True)
    assert HEARD["given"]["id"] == given["id"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(source, recipe, tmp_path / "other", ONE, log_to=["wandb"])
    assert HEARD["given"]["project"] == "mine"
    assert HEARD["given"]["id"] != given["id"], "W&B would drop the steps that the run of another output has already"


def test_what_cannot_be_told_is_said_before_training(
    tmp_path: Path, inputs: Any, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = inputs
    with pytest.raises(UsageError, match="not known"):
        train(source, recipe, tmp_path / "out", ONE, log_to=["telegraph"])
    monkeypatch.setitem(TRACKERS, "telegraph", ("no_such_package_here", Run))
    with pytest.raises(MachineError) as missing:
        train(source, recipe, tmp_path / "out", ONE, log_to=["telegraph"])
    assert "moectl[log]" in missing.value.fix

    def refuse(**_given: Any) -> None:
        raise RuntimeError("no API key\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, __spec__=SimpleNamespace()))
    with pytest.raises(MachineError, match="could not begin: no API key"):
        train(source, recipe, tmp_path / "out", ONE, log_to=["wandb"])
    assert not (tmp_path / "out.partial").exists()
