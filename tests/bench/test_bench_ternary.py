"""`moectl bench kernels --what ternary`: every way is right, and the columns follow from one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels.ternary import decode
from moectl.bench import coded, ternary
from moectl.bench.shapes import parse
from moectl.bench.sweep import Settings
from moectl.cli.main import app
from moectl.errors import UsageError

SHAPE = parse("64,48,4,2")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had a cache of 64 KiB: a few sets of inputs are enough to outgrow it."""
    monkeypatch.setattr("moectl.bench.device.cache_bytes", lambda _device: 1 << 16)
    monkeypatch.setattr("moectl.bench.coded.cache_bytes", lambda _device: 1 << 16)


def measured(dtype: str) -> list[dict[str, Any]]:
    settings = Settings([SHAPE], [1, 5], ["fwd"], [dtype], [], device="cpu", seconds=0.001)
    return ternary.measure(settings)["rows"]


@pytest.mark.usefixtures("roof")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows(dtype: str) -> None:
    rows = measured(dtype)
    assert [(row["what"], row["tokens"], row["stage"]) for row in rows] == [
        (what, tokens, way)
        for tokens in (1, 5)
        for what, ways in (("up", ternary.WAYS), ("down", ternary.WAYS), ("layer", ternary.LAYERS))
        for way in ways
    ]
    assert [row["reason"] for row in rows if row["reason"]] == []
    for row in rows:
        if row["what"] != "layer":
            tolerance = 0.03 if row["stage"] == "int8" else 1e-5 if dtype == "float32" else 1e-2
            assert row["stage"] == "bmm" or row["max_error"] <= tolerance
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["p50_ms"])
        first = next(
            other for other in rows if [other[key] for key in ("what", "tokens")] == [row["what"], row["tokens"]]
        )
        assert row["speedup"] == pytest.approx(first["p50_ms"] / row["p50_ms"])
        assert row["speedup_over"] == first["stage"]
    up = next(row for row in rows if row["what"] == "up" and row["stage"] == "ternary" and row["tokens"] == 1)
    assert up["weights_per_s"] == pytest.approx(2 * 96 * 64 / up["p50_ms"] * 1000)
    # 0.9 zeros: about 0.6 bits a weight, and 48 bits a row of bfloat16 levels, 80 of float32
    bits = up["gbs"] * 1e9 * 8 / up["weights_per_s"] - (48 if dtype == "bfloat16" else 80) / 64
    assert 0.55 < bits < 0.9


def test_a_wrong_product_shows_in_its_error(monkeypatch: pytest.MonkeyPatch, roof: None) -> None:
    monkeypatch.setattr(ternary, "matvec", lambda coded, x, expert: x.new_zeros(len(x), coded.rows))
    assert all(
        row["max_error"] == 1 for row in measured("float32") if row["stage"] == "ternary" and row["what"] != "layer"
    )


def test_stacks_are_one_matrix_three_times() -> None:
    up, down = coded.make_stacks(SHAPE, torch.bfloat16, torch.device("cpu"), 0)
    for stack, size in ((up, (4, 96, 64)), (down, (4, 64, 48))):
        assert stack.dense.shape == size
        assert all(torch.equal(decode(copy), stack.dense) for copy in stack.copies)
        rounded = stack.whole.float() * stack.scale[..., None]
        assert (rounded - stack.dense.float()).abs().max() <= stack.scale.float().max()
        assert sum(copy.nbytes for copy in stack.copies) >= 1 << 17 or len(stack.copies) == coded.MOST_COPIES
        assert abs((stack.dense == 0).float().mean() - coded.ZEROS) < 0.02


@pytest.mark.usefixtures("roof")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, page = tmp_path / "ternary.json", tmp_path / "ternary.html"
    arguments = ["--shape", "64,48,4,2", "--tokens", "1", "--time", "0.001", "--device", "cpu", "-o", str(result)]

    def kernels(*more: str) -> None:
        app(["bench", "kernels", "--what", *more], standalone_mode=False)

    kernels("ternary", *arguments, "--html", str(page))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 13
    assert "times as fast as torch.mv at 1 token" in err
    assert "codewords, counts and levels" in page.read_text()
    app(["bench", "report", str(result)], standalone_mode=False)
    assert "| 64,48,4,2 | float32 | 1 | up: ternary |" in capsys.readouterr().out
    kernels("ternary", *arguments, "--baseline", str(result), "--fail-slower", "1000000%")
    assert "layer T=1: " in capsys.readouterr().err
    assert json.loads(result.read_text())["settings"]["what"] == "ternary"
    for wrong in ("sideways", "stages,ternary"):
        with pytest.raises(UsageError):
            kernels(wrong)
