"""Two processes under torchrun, on the CPU with gloo: the same step, the same resumed run, and a loud end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training as models
import torch
from tiny_training import ONE

from moectl.checkpoint.source import Checkpoint
from moectl.training.metrics import read_metrics
from moectl.training.run import METRICS, train

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def test_two_processes_compute_the_same_step_and_resume(tmp_path: Path) -> None:
    data = models.write_data(tmp_path / "data")
    moe = models.save_moe(tmp_path / "moe")
    models.save_moe(tmp_path / "ds", "deepseek_v3", num_hidden_layers=3)
    script = [str(HERE / "two_processes.py"), str(tmp_path)]
    done = subprocess.run([*TORCHRUN, *script], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("fsdp", "fsdp with biases", "fsdp and experts"):
        step = found[name]
        assert step["held"][0] == 4 and ("ep" in step["held"]) == ("experts" in name) and step["loads_equal"]
        assert step["difference"] <= 1e-6 < 1e-3 < step["moved"], name
        for measure in ("loss", "aux", "grad_norm"):
            assert step[measure][0] == pytest.approx(step[measure][1], rel=1e-6), (name, measure)

    assert found["stopped_resumed"] == found["stopped_left"] == [3, signal.SIGTERM]
    assert models.equal(tmp_path / "resumed", tmp_path / "undisturbed")
    # What two processes left behind is finished by one.
    assert train(Checkpoint.open(moe), models.recipe(data, learning_rate=3e-4), tmp_path / "left", ONE).step == 6
    for name, tensor in models.tensors(tmp_path / "spread").items():
        other = models.tensors(tmp_path / "undisturbed")[name]
        assert (tensor.double() - other.double()).norm() / other.double().norm() <= 1e-6, name
    alone, together = models.tensors(tmp_path / "left"), models.tensors(tmp_path / "undisturbed")
    assert alone.keys() == together.keys() == models.tensors(moe).keys()
    for name, tensor in together.items():
        difference = (alone[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert difference <= 1e-6, (name, difference)


def test_a_lost_process_ends_the_run_and_is_named(tmp_path: Path) -> None:
    moe, data = models.save_moe(tmp_path / "moe"), models.write_data(tmp_path / "data")
    words = ["-m", "moectl", "train", str(moe), "-o", str(tmp_path / "out"), "--data", data[0], "--steps", "100000"]
    words += ["--batch-size", "4", "--seq-len", "32", "--device", "cpu", "--save-every", "5"]
    launcher = subprocess.Popen([*TORCHRUN, *words], stderr=subprocess.PIPE, text=True, env=environment())
    metrics = tmp_path / "out.partial" / METRICS
    while launcher.poll() is None and len(read_metrics(metrics)) < 12:
        time.sleep(0.05)
    victim = sorted(_children(launcher.pid))[1]
    os.kill(victim, signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert str(victim) in stderr and ("SIGKILL" in stderr or "Signal 9" in stderr)
    assert (tmp_path / "out.partial" / "checkpoints" / "latest").exists() and not (tmp_path / "out").exists()


def _children(pid: int) -> list[int]:
    """The processes whose parent is `pid`, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def test_the_measure_of_difference_sees_one_float32_step() -> None:
    """The planted error: one weight in a hundred moved by a thousandth is above the tolerance."""
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    moved = tensor.clone()
    moved[0] *= 1.001
    assert (moved - tensor).norm() / tensor.norm() > 1e-6
