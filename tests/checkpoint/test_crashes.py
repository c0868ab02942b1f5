"""Whatever fails, is killed or loses power, and at whichever effect: nothing half-made is ever taken for an output.

After each interruption the output is absent, or as it was, or complete; then the same command ends in the very
bytes of an undisturbed run and leaves nothing else behind. `pytest -s` shows how many moments were tried.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from disks import Effects, Failing, Killed, PowerLoss, Volatile, killed
from trees import dense_llama, tree

from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.workers import Worker
from moectl.checkpoint.writer import write
from moectl.errors import MachineError
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass
class Case:
    """A disk in some state, and the command that is interrupted on it."""

    plan: Plan
    dense: Path
    disk: Path
    begun: Path
    clean: dict[str, str]
    old: dict[str, str] | None
    overwrite: bool = False
    worker: Worker | None = None

    @property
    def out(self) -> Path:
        return self.disk / "moe"

    def reset(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.copytree(self.begun, self.disk)

    def run(self, fs: FileSystem) -> None:
        write(self.plan, self.out, overwrite=self.overwrite, worker=self.worker, fs=fs)

    def check(self, moment: str) -> None:
        """The invariant, then the same command again."""
        partial = self.disk / "moe.partial"
        if self.out.exists():
            assert tree(self.out) in (self.clean, self.old), f"{moment}: the output is neither old nor new"
        elif self.old is not None:
            # Between two renames: the new one is complete and only wants its name.
            assert tree(partial / "checkpoint") == self.clean, f"{moment}: neither old nor new is there"
        self.run(Effects())
        assert tree(self.disk) == {f"moe/{name}": digest for name, digest in self.clean.items()}, moment
        assert [path.name for path in self.disk.iterdir()] == ["moe"], f"{moment}: something was left over"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a thousand removals take seconds on a disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


CASES = ["fresh", "overwrite", "discard", "last worker"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, memory: Path) -> Case:
    dense = dense_llama(memory / "dense", **TINY)
    source = Checkpoint.open(dense)
    plan = plan_sparse(source, SparseRecipe(experts=1, top_k=1, noise=0.01, shard_bytes=600))
    other = replace(plan, seed=1)
    assert len(plan.shards) >= 3
    assert {plan.is_copied(tensor) for tensor in plan.tensors} == {True, False}
    write(plan, memory / "clean")
    begun = memory / "begun"
    begun.mkdir()
    made = Case(plan, dense, memory / "disk", begun, tree(memory / "clean"), None)
    made.reset()
    if request.param == "overwrite":
        write(other, made.out)
        made = replace(made, overwrite=True, old=tree(made.out))
    elif request.param == "discard":  # shards of another plan, with the very same headers
        for number in (1, 2):
            assert write(other, made.out, worker=Worker(number, 3)).missing
        made = replace(made, overwrite=True)
    elif request.param == "last worker":
        assert write(plan, made.out, worker=Worker(1, 2)).missing
        made = replace(made, worker=Worker(2, 2))
    shutil.rmtree(begun)
    shutil.copytree(made.disk, begun)
    return made


def until_it_succeeds(case: Case, interrupted: Callable[[int], bool]) -> int:
    """Try n = 1, 2, ... until the n-th effect is past the end; how many moments there were."""
    before = tree(case.dense)
    n = 1
    while True:
        case.reset()
        if not interrupted(n):
            break
        case.check(f"n = {n}")
        n += 1
    assert tree(case.dense) == before
    assert tree(case.out) == case.clean
    return n - 1


Record = Callable[[str, object], None]


def report(record_property: Record, moments: int) -> None:
    assert moments > 40
    record_property("moments of a crash tried", moments)


@pytest.mark.parametrize("case", ["fresh", "overwrite", "last worker"], indirect=True)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_any_effect_may_fail(case: Case, code: int, record_property: Record) -> None:
    def fails(n: int) -> bool:
        fs = Failing(n, code)
        with suppress(MachineError):
            case.run(fs)
        return fs.done >= n

    report(record_property, until_it_succeeds(case, fails))


@pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
def test_the_process_may_be_killed_at_any_effect(case: Case, torn: bool, record_property: Record) -> None:
    report(record_property, until_it_succeeds(case, lambda n: killed(lambda: case.run(Killed(n, torn)))))


@pytest.mark.parametrize(
    ("case", "how"),
    [("fresh", "lost"), ("fresh", "ahead"), ("overwrite", "lost"), ("overwrite", "ahead")]
    + [(case, "mixed") for case in CASES],
    indirect=["case"],
)
def test_the_power_may_go_at_any_effect(case: Case, how: str, record_property: Record) -> None:
    choose = random.Random(0)

    def loses_power(n: int) -> bool:
        fs = Volatile(case.disk, n)
        with suppress(PowerLoss):
            case.run(fs)
        if fs.off:
            fs.settle(how, choose)
        return fs.off

    report(record_property, until_it_succeeds(case, loses_power))


def test_the_output_survives_power_loss_once_the_command_has_ended(case: Case) -> None:
    fs = Volatile(case.disk, 10**9)
    case.run(fs)
    fs.settle("lost", random.Random(0))
    assert tree(case.out) == case.clean
