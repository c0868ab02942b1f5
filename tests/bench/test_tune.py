"""The search for launch choices, on a machine that is made up."""

import json

import pytest

from moe_kernels import tuning
from moe_kernels.target import Target
from moectl.bench import tune
from moectl.bench.run import Settings
from moectl.bench.shapes import PRESETS
from moectl.errors import MachineError

LINES = list(tune.current(Target("sm_90", "a GPU that nobody has tuned")))


def cost(line: tuning.Line) -> float:
    """Milliseconds of a made-up device: best at 64 rows, 128 columns and 8 warps; 256 does not launch."""
    if line["up"].block_n == 256:
        return float("inf")
    misses = (
        [line.block_m != 64]
        + [line[k].block_n != 128 for k in tune.FORWARD]
        + [line[k].warps != 8 for k in tune.FORWARD]
    )
    return 1.0 + sum(misses)


def test_the_planted_optimum_is_found():
    start = tune.with_block_m(LINES[0], 16)
    best = tune.search(start, tune.FORWARD, cost, seconds=10)
    assert cost(best) == 1.0 and best.block_m == best["up"].block_m == 64
    assert best["dw"] == start["dw"] and best["dx"].block_n == start["dx"].block_n


def test_without_time_or_gain_nothing_changes():
    assert tune.search(LINES[0], tune.FORWARD, lambda _: 1.0, seconds=10) == LINES[0]
    assert tune.search(LINES[0], tune.FORWARD, cost, seconds=0) == LINES[0]


def test_the_line_for_a_batch_is_the_one_the_kernels_take():
    for rows, experts in ((1, 128), (16, 8), (4096, 64), (10**6, 8)):
        assert LINES[tune.find(LINES, rows, experts)] == tuning.choose(Target("sm_90", "a GPU"), rows, experts)


def test_export_for_vllm(tmp_path):
    shape = PRESETS["qwen3-30b-a3b"]
    path = tune.export_vllm(shape, LINES, "NVIDIA H200", tmp_path)
    assert path.name == "E=128,N=768,device_name=NVIDIA_H200.json"
    entries = json.loads(path.read_text())
    assert list(entries) == [str(tokens) for tokens in tune.VLLM_TOKENS]
    keys = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}
    assert all(set(entry) == keys and min(entry.values()) >= 1 for entry in entries.values())


def test_trials_leave_the_users_table_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with tune._scratch():
        assert not str(tuning.save("a GPU", tuple(LINES))).startswith(str(tmp_path))
    assert not list(tmp_path.iterdir()) and tuning.user_table("a GPU").is_relative_to(tmp_path)


def test_a_cpu_has_nothing_to_tune():
    with pytest.raises(MachineError):
        tune.tune(Settings([], [], [], [], [], device="cpu"), 1)
