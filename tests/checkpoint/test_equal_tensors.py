"""Tensors that are computed alike are computed once a shard and copied from there: same bytes, same hashes."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import Failing
from files import checkpoint, random_array
from trees import dense_llama, tree

from moectl.checkpoint import evaluate as evaluation
from moectl.checkpoint.expressions import Copy, Scale
from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import MachineError
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

PARTS = {"a": ("x", 2.0, "F32"), "b": ("x", 2.0, "F16"), "c": ("y", 2.0, "F32"), "d": ("x", 3.0, "F32")}
"""Tensor, factor and type by the first letter of an output's name; two of these always differ in one thing."""

NAMES = ["a", "b", "c", "d", "a again", "b again", "d again", "d once more", "a once more"]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    arrays = {"x": random_array((5, 7), seed=1), "y": random_array((5, 7), seed=2)}
    source = Checkpoint.open(checkpoint(tmp_path / "source", arrays))
    tensors = [planned("other", Copy("y"), (source,))]
    for name in NAMES:
        of, factor, dtype = PARTS[name[0]]
        tensors.append(planned(name, Scale(Copy(of), factor), (source,), dtype))
    return Plan((source,), tuple(tensors), {}, {"model_type": "llama"}, shard_bytes=1000)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is computed."""
    names = Counter[str]()
    real = evaluation.evaluate

    def counted(tensor: OutputTensor, *given: Any) -> Iterator[bytes]:
        names[tensor.name] += 1
        return real(tensor, *given)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    return names


def check(out: Path) -> None:
    found = Checkpoint.open(out)
    inputs = {name: np.asarray(random_array((5, 7), seed=seed), np.float64) for name, seed in (("x", 1), ("y", 2))}
    for name in NAMES:
        of, factor, dtype = PARTS[name[0]]
        ref = found.tensors[name]
        expected = (factor * inputs[of]).astype({"F32": np.float32, "F16": np.float16}[dtype])
        assert ref.file.read_bytes()[ref.offset : ref.offset + ref.nbytes] == expected.tobytes(), name
    assert verify_hashes(found).ok


def test_each_shard_computes_what_is_equal_once(plan: Plan, computed: Counter[str], tmp_path: Path) -> None:
    progress: list[int] = []
    write(plan, tmp_path / "out", on_bytes=progress.append)
    check(tmp_path / "out")
    expected = Counter[str]()
    for shard in plan.shards:
        firsts: dict[object, str] = {}
        for tensor in shard.tensors:
            if tensor.name != "other":
                firsts.setdefault((tensor.expression, tensor.dtype), tensor.name)
        expected.update(firsts.values())
    assert len(plan.shards) == 2 and computed == expected
    assert len(NAMES) > computed.total() > 4, "some in both shards, none twice in one"
    assert sum(progress) == plan.nbytes


def test_a_finished_output_is_checked_by_computing_once(plan: Plan, computed: Counter[str], tmp_path: Path) -> None:
    write(plan, tmp_path / "out")
    computed.clear()
    assert write(plan, tmp_path / "out").shards_written == 0
    assert computed == Counter("abcd")


def test_whatever_fails_the_next_run_ends_in_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    write(plan, tmp_path / "clean")
    for n in count(1):
        fs = Failing(n, errno.EIO)
        try:
            write(plan, tmp_path / "out", fs=fs)
        except MachineError:
            write(plan, tmp_path / "out")
        assert tree(tmp_path / "out") == tree(tmp_path / "clean"), f"effect {n}"
        FileSystem().remove_tree(tmp_path / "out")
        if fs.done < n:
            break
    assert n > 30


def test_experts_that_start_equal_are_computed_once(computed: Counter[str], tmp_path: Path) -> None:
    """Three experts in another type than the dense FFN: gate, up and down of two layers, not of two times three."""
    source = Checkpoint.open(dense_llama(tmp_path / "dense"))
    write(plan_sparse(source, SparseRecipe(experts=3, dtype="float16")), tmp_path / "moe")
    experts = [name for name in computed.elements() if ".experts." in name]
    assert len(experts) == 2 * 3 and all(".experts.0." in name for name in experts)
