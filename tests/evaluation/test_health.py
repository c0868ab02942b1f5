"""Expert and router health equals whole-matrix numpy, and finds what is planted."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from files import checkpoint, random_array

from moectl.checkpoint.source import Checkpoint
from moectl.evaluation import health as module
from moectl.evaluation.health import health

BLOCK = "model.layers.0.mlp"
SHAPES = {"gate_proj": (6, 5), "up_proj": (6, 5), "down_proj": (5, 6)}


def experts(number: int) -> dict[str, np.ndarray]:
    """Per-expert tensors of one layer with a router."""
    arrays = {f"{BLOCK}.gate.weight": random_array((number, 5), seed=99)}
    for expert in range(number):
        for i, (matrix, shape) in enumerate(SHAPES.items()):
            arrays[f"{BLOCK}.experts.{expert}.{matrix}.weight"] = random_array(shape, seed=10 * expert + i)
    return arrays


def flat(arrays: dict[str, np.ndarray], expert: int) -> np.ndarray:
    parts = [arrays[f"{BLOCK}.experts.{expert}.{matrix}.weight"].astype("f8").ravel() for matrix in SHAPES]
    return np.concatenate(parts)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_equals_whole_matrices(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    arrays = experts(12)
    (layer,) = health(Checkpoint.open(checkpoint(tmp_path / "m", arrays))).layers
    rows = [flat(arrays, expert) for expert in range(12)]
    norms = [np.linalg.norm(row) for row in rows]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(rows, 2)]
    router = arrays[f"{BLOCK}.gate.weight"].astype("f8")
    assert (layer.layer, layer.experts, layer.zero_experts) == (BLOCK, 12, 0)
    assert [layer.norm_min, layer.norm_max] == pytest.approx([min(norms), max(norms)], rel=1e-12)
    assert [layer.cosine_min, layer.cosine_mean, layer.cosine_max] == pytest.approx(
        [min(cosines), np.mean(cosines), max(cosines)], rel=1e-9
    )
    assert layer.router_std == pytest.approx(router.std(), rel=1e-12)
    assert layer.router_row_norm_max == pytest.approx(np.linalg.norm(router, axis=1).max(), rel=1e-12)


def test_fused_tensors_say_the_same(tmp_path: Path) -> None:
    arrays = experts(4)
    fused = {
        f"{BLOCK}.gate.weight": arrays[f"{BLOCK}.gate.weight"],
        f"{BLOCK}.experts.gate_up_proj": np.stack(
            [
                np.concatenate([arrays[f"{BLOCK}.experts.{e}.{m}.weight"] for m in ("gate_proj", "up_proj")])
                for e in range(4)
            ]
        ),
        f"{BLOCK}.experts.down_proj": np.stack([arrays[f"{BLOCK}.experts.{e}.down_proj.weight"] for e in range(4)]),
    }
    (a,) = health(Checkpoint.open(checkpoint(tmp_path / "a", arrays))).layers
    (b,) = health(Checkpoint.open(checkpoint(tmp_path / "b", fused))).layers
    assert b.cosine_mean == pytest.approx(a.cosine_mean, rel=1e-9) and b.norm_max == pytest.approx(a.norm_max, rel=1e-9)
    assert (a.layer, a.experts, a.router_std) == (b.layer, b.experts, b.router_std)


def test_planted_faults_are_found(tmp_path: Path) -> None:
    arrays = experts(4)
    for matrix in SHAPES:
        arrays[f"{BLOCK}.experts.1.{matrix}.weight"] = arrays[f"{BLOCK}.experts.0.{matrix}.weight"]
        arrays[f"{BLOCK}.experts.2.{matrix}.weight"] = np.zeros(SHAPES[matrix], "f4")
    arrays[f"{BLOCK}.experts.3.up_proj.weight"][0, :2] = [np.nan, np.inf]
    arrays["model.norm.weight"] = np.array([1, np.nan], "f4")
    found = health(Checkpoint.open(checkpoint(tmp_path / "m", arrays)))
    (layer,) = found.layers
    assert layer.cosine_max == pytest.approx(1.0) and layer.zero_experts == 1 and layer.norm_min == 0
    assert found.nonfinite == {f"{BLOCK}.experts.3.up_proj.weight": 2, "model.norm.weight": 1}


def test_a_dense_model_has_no_layers_to_report(tmp_path: Path) -> None:
    found = health(Checkpoint.open(checkpoint(tmp_path / "m", {"model.norm.weight": np.ones(3, "f4")})))
    assert found.layers == () and found.nonfinite == {}
