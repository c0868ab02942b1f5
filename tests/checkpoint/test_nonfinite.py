"""NaN and infinity in a source are refused by name, also where they are only copied, and accepted on request."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from files import checkpoint

from moectl.checkpoint.expressions import Copy, Slice
from moectl.checkpoint.hashing import count_nonfinite
from moectl.checkpoint.plan import Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.workers import Worker
from moectl.checkpoint.writer import write
from moectl.errors import InputError


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_refused_by_name_even_if_only_copied(dtype: str, bad: float, tmp_path: Path) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    good = np.full((5, 7), np.finfo(kind).max if dtype != "bfloat16" else 3.38e38, kind)
    good[1] *= -1
    broken = good.copy()
    broken[2:4, 3] = bad
    source = Checkpoint.open(checkpoint(tmp_path / "m", {"good": good, "broken": broken, "ids": np.full(4, -1)}))
    whole = [planned(name, Copy(name), (source,)) for name in ("good", "broken", "ids")]
    copies = [planned(f"copy.{i}", Copy("broken"), (source,)) for i in range(3)]
    plan = Plan((source,), (*whole, *copies), {}, {"model_type": "llama"})
    with pytest.raises(InputError, match=r"NaN or infinity: broken \(2\)\."):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(plan, tmp_path / "out", allow_nonfinite=True)
    assert Checkpoint.open(tmp_path / "out").read("broken").tobytes() == broken.tobytes()
    part = Plan((source,), (planned("part", Slice(Copy("broken"), 0, 0, 2), (source,)),), {}, {"model_type": "llama"})
    write(part, tmp_path / "part")


def test_nonfinite_weights_that_are_computed_with_are_named_too(tmp_path: Path) -> None:
    values = np.ones((4, 4), np.float32)
    values[0, 1] = np.inf
    source = Checkpoint.open(checkpoint(tmp_path / "m", {"w": values}))
    plan = Plan((source,), (planned("w", Copy("w"), (source,), "BF16"),), {}, {"model_type": "llama"})
    for allow in (False, True):
        with pytest.raises(InputError, match=r"NaN or infinity: w \(1\)\."):
            write(plan, tmp_path / "out", allow_nonfinite=allow)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_let_through_is_not_taken_up_without_the_flag(tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint(tmp_path / "m", {"w": np.array([np.nan, 1.0]), "v": np.ones(2)}))
    tensors = tuple(planned(name, Copy(name), (source,)) for name in ("w", "v"))
    plan = Plan((source,), tensors, {}, {"model_type": "llama"}, shard_bytes=1)
    assert not write(plan, tmp_path / "out", worker=Worker(1, 2), allow_nonfinite=True).published
    with pytest.raises(InputError, match=r"NaN or infinity: w \(1\)"):
        write(plan, tmp_path / "out")
    assert write(plan, tmp_path / "out", allow_nonfinite=True).published


@pytest.mark.parametrize(("dtype", "bits"), [("F16", 16), ("BF16", 16)])
def test_every_bit_pattern_is_counted_as_numpy_would(dtype: str, bits: int) -> None:
    patterns = np.arange(1 << bits, dtype=np.uint16)
    values = patterns.view(np.float16 if dtype == "F16" else ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values)
    assert count_nonfinite(memoryview(patterns).cast("B"), dtype) == int((~finite).sum())
    assert count_nonfinite(memoryview(np.ascontiguousarray(patterns[finite])).cast("B"), dtype) == 0
    for pattern in patterns[~finite]:
        assert count_nonfinite(memoryview(np.append(patterns[finite][:8], pattern)).cast("B"), dtype) == 1
    assert count_nonfinite(memoryview(patterns).cast("B"), "U16") == 0
