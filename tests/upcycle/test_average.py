"""The weight average: float64 means rounded once, an ordinary dense checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_btx import branches, round_once
from test_pairs import logits, relative_error, reload
from trees import arrays_equal

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError, UsageError
from moectl.families.tiny import tiny_model
from moectl.upcycle.average import plan_average
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert


def averaged(models: list[Path], out: Path, **recipe: Any) -> Path:
    """The written average of some checkpoints."""
    asked = BtxRecipe(tuple(Expert(str(each)) for each in models), top_k=1, **recipe)
    write(plan_average(open_models(asked), asked), out)
    return out


@pytest.mark.parametrize(("average", "weights"), [("mean", (1, 1, 1)), ("3,0.5,0", (3, 0.5, 0))])
def test_every_weight_is_the_float64_mean_rounded_once(
    average: str, weights: tuple[float, ...], tmp_path: Path
) -> None:
    sources = [Checkpoint.open(path) for path in branches(tmp_path)]
    result = Checkpoint.open(averaged([each.path for each in sources], tmp_path / "out", average=average))
    assert set(result.tensors) == set(sources[0].tensors)
    for name in result.tensors:
        wide = np.stack([each.read(name).astype(np.float64) for each in sources])
        exact = np.tensordot(np.array(weights, np.float64), wide, 1) / sum(weights)
        assert arrays_equal(result.read(name), round_once(exact, ml_dtypes.bfloat16)), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3"])
def test_the_average_of_one_model_is_that_model(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path / "dense")
    again = reload(averaged([tmp_path / "dense"] * 2, tmp_path / "out"))
    assert type(again) is type(dense)
    assert relative_error(logits(again), logits(dense)) == 0
    tiny_model(family, seed=1).save_pretrained(tmp_path / "other")
    other = reload(averaged([tmp_path / "dense", tmp_path / "other"], tmp_path / "mixed"))
    assert relative_error(logits(other), logits(dense)) > 1e-3


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    tiny_model("qwen3").save_pretrained(tmp_path / "qwen3")
    with pytest.raises(InputError, match="model_type"):
        averaged([tmp_path / "llama", tmp_path / "qwen3"], tmp_path / "out")
    for average in ("base", "1,2,3"):
        with pytest.raises(UsageError, match="--weights"):
            averaged([tmp_path / "llama"] * 2, tmp_path / "out", average=average)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_path(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    command = [sys.executable, "-m", "moectl", "average", *[str(tmp_path / "llama")] * 2, "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path / 'out'}\n"), ran.stderr
    assert "moectl verify" in ran.stderr
    verified = subprocess.run([*command[:3], "verify", str(tmp_path / "out")], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
