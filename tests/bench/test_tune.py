"""The search for launch choices, on a machine that is made up."""

import json
from dataclasses import replace

import pytest

from moe_kernels import tuning
from moe_kernels.target import Target
from moectl.bench import tune
from moectl.bench.shapes import PRESETS, Shape
from moectl.bench.sweep import Settings
from moectl.errors import MachineError

GPU = Target("sm_90", "a GPU that nobody has tuned")
LINES = list(tuning.table(GPU))


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


def cells_of(what, dtypes=("bfloat16",), tokens=(1, 4, 4096)):
    skipped = []
    shape = Shape(64, 32, 128, 8, name="s")
    settings = Settings([shape], list(tokens), [what], list(dtypes), [])
    found = tune.by_line(settings, GPU, skipped.append)
    for place, cells in found.items():
        for _, _, count in cells:
            assert LINES[place] == tuning.choose(GPU, count * 8, 128)
    return {(dtype, count) for cells in found.values() for _, dtype, count in cells}, skipped


def test_only_cells_that_launch_a_line_are_tuned():
    """One and four tokens of 128 experts go to the small-batch kernels, unless there is a backward pass."""
    tuned, skipped = cells_of("fwd")
    assert tuned == {("bfloat16", 4096)} and len(skipped) == 2 and "small-batch" in skipped[0]
    assert cells_of("train") == ({("bfloat16", count) for count in (1, 4, 4096)}, [])


def test_only_types_of_two_bytes_are_tuned():
    tuned, skipped = cells_of("fwd", ("float32", "float16"), [4096])
    assert tuned == {("float16", 4096)} and len(skipped) == 1 and "float32" in skipped[0]


def test_cells_that_share_a_line_are_weighed_together():
    """What helps a long cell by 5 % and costs a short one 50 % is no gain, in whatever order they come."""
    start = LINES[0]
    other = replace(start, block_m=start.block_m * 2)

    def long(line):
        return 95.0 if line == other else 100.0

    def short(line):
        return 1.5 if line == other else 1.0

    for cells in ([long, short], [short, long]):
        measure = tune.together(cells)
        assert measure(start) == 2.0 and measure(other) == pytest.approx(2.45)
    broken = tune.together([long, lambda line: 3.0 if line == other else float("inf")])
    assert broken(start) == float("inf") and broken(other) == pytest.approx(1.95)


def test_export_for_vllm(tmp_path):
    shape = PRESETS["qwen3-30b-a3b"]
    path = tune.export_vllm(shape, Target("sm_90", "NVIDIA H200"), tmp_path)
    assert path.name == "E=128,N=768,device_name=NVIDIA_H200.json"
    entries = json.loads(path.read_text())
    assert list(entries) == [str(tokens) for tokens in tune.VLLM_TOKENS]
    keys = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}
    assert all(set(entry) == keys and min(entry.values()) >= 1 for entry in entries.values())


def test_trials_leave_the_users_table_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with tune._scratch():
        assert not str(tuning.save(GPU.name, tuple(LINES[:1]))).startswith(str(tmp_path))
        assert tuning.table(GPU) == tuple(LINES[:1])
    assert tuning.table(GPU) == tuple(LINES)
    assert not list(tmp_path.iterdir()) and tuning.user_table("a GPU").is_relative_to(tmp_path)


def test_a_cpu_has_nothing_to_tune():
    with pytest.raises(MachineError):
        tune.tune(Settings([], [], [], [], [], device="cpu"), 1)
