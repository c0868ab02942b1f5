"""Two processes under torchrun, on the CPU with gloo: the same step, the same resumed run, and a loud end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_training as models
import torch
from installed import needs
from safetensors.torch import load_file, save_file
from tiny_training import ONE

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.families.releases import RECORDS
from moectl.training.metrics import read_metrics
from moectl.training.run import METRICS, train
from moectl.upcycle.pesc import Base, PescRecipe, plan_pesc

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_hidden_layers": 3},
    "gpt_oss": {},
    "llama": {"tie_word_embeddings": True, "vocab_size": 261, "intermediate_size": 33},
    "mixtral": {"num_local_experts": 3},
}
"""What is loaded in pieces: a router bias, stored biases and sinks, a tied head and odd sizes, experts to fuse."""


def save_models_to_load(directory: Path) -> None:
    """The `MODELS`, and a Llama whose config ties two tensors that differ."""
    for name, sizes in MODELS.items():
        (models.save_dense if name == "llama" else partial(models.save_moe, model_type=name))(directory / name, **sizes)
    parted = models.save_dense(directory / "parted", tie_word_embeddings=True)
    tensors = models.tensors(parted)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, parted / "model.safetensors", {"format": "pt"})


def save_what_is_refused(directory: Path) -> None:
    """A quantised model, one of numbers that are none, and a file that holds no steps."""
    quantised, broken = models.save_moe(directory / "quantised"), models.save_moe(directory / "broken")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    tensors = models.tensors(broken)
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (directory / "found-before.json").write_text("[]\n")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


@needs("deepseek_v3", since=RECORDS)
def test_two_processes_compute_the_same_step_and_resume(tmp_path: Path) -> None:
    data = models.write_data(tmp_path / "data")
    moe = models.save_moe(tmp_path / "moe")
    models.save_moe(tmp_path / "ds", "deepseek_v3", num_hidden_layers=3)
    save_models_to_load(tmp_path / "load")
    save_what_is_refused(tmp_path)
    pesc = PescRecipe(experts=4, adapter_dim=8, lora_rank=2)
    write(plan_pesc(Base.open(str(models.save_dense(tmp_path / "dense"))), pesc), tmp_path / "pesc")
    script = [str(HERE / "two_processes.py"), str(tmp_path)]
    done = subprocess.run([*TORCHRUN, *script], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["loaded_alike"] == dict.fromkeys([*MODELS, "parted"], True)
    for name in ("fsdp", "fsdp with biases", "fsdp and experts"):
        step = found[name]
        assert step["held"][0] == 4 and ("ep" in step["held"]) == ("experts" in name) and step["loads_equal"]
        assert step["difference"] <= 1e-6 < 1e-3 < step["moved"], name
        for measure in ("loss", "aux", "grad_norm"):
            assert step[measure][0] == pytest.approx(step[measure][1], rel=1e-6), (name, measure)

    step = found["pesc"]
    assert step["base_in_pieces"] and step["loads_equal"] and step["difference"] <= 1e-6
    assert step["numbers"][0] == pytest.approx(step["numbers"][1], rel=1e-6)
    ends = [load_file(tmp_path / f"pesc-{name}" / "adapter_model.safetensors") for name in ("undisturbed", "resumed")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

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

    assert found["refused"] == {
        "the model is quantised": [["InputError", 3], ["SaidElsewhere", 3]],
        "there is nothing to train": [["InputError", 3], ["SaidElsewhere", 3]],
        "the loss is not finite": [["CheckFailed", 5], ["SaidElsewhere", 5]],
        "the file of steps is another's": [["UsageError", 2], ["SaidElsewhere", 2]],
        "the disk is full": [["OSError", None], ["SaidElsewhere", 4]],
        "a process cannot read the data": [["SaidElsewhere", 3], ["InputError", 3]],
    }

    assert found["room"]["apart"] == found["room"]["whole"] and any(map(any, found["room"]["whole"]))
    for router, accumulate in models.COUNTING.items():
        out = tmp_path / models.named(router)
        alone_out = out.with_name(f"{out.name}-alone")
        train(Checkpoint.open(moe), models.routed_recipe(data, router, accumulate), alone_out, ONE)
        check_alike(models.tensors(out), models.tensors(alone_out), router)


def check_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], router: str) -> None:
    """What moved by counts alone is the same to the bit, all else to the rounding of sums."""
    assert found.keys() == expected.keys()
    counted = {name for name in found if name.endswith(("router.bias", "router.coefficient"))}
    assert bool(counted) == router.startswith(("deepseek", "remoe"))
    for name, tensor in found.items():
        close = 0.0 if name in counted else 1e-5
        assert (tensor.double() - expected[name].double()).norm() <= close * expected[name].double().norm(), name


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
    _, stderr = launcher.communicate(timeout=300)
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
