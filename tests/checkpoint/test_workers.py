"""Many workers over one plan make the bytes of one, in any order, killed or not, and whoever is last publishes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disks import Effects
from trees import dense_llama, tree

from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.journal import Journal
from moectl.checkpoint.plan import Plan
from moectl.checkpoint.publish import finish
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.workers import Worker, parse_worker
from moectl.checkpoint.writer import write
from moectl.errors import InputError, UsageError
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

RECIPE = SparseRecipe(experts=4, noise=0.01, shard_bytes=10_000)
MOECTL = [sys.executable, "-m", "moectl"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_llama(tmp_path / "dense")


@pytest.fixture
def plan(dense: Path) -> Plan:
    made = plan_sparse(Checkpoint.open(dense), RECIPE)
    assert len(made.shards) >= 8
    return made


@pytest.fixture
def clean(plan: Plan, tmp_path: Path) -> dict[str, str]:
    write(plan, tmp_path / "clean", fs=Effects())
    made = tree(tmp_path / "clean")
    shutil.rmtree(tmp_path / "clean")
    return made


def work(plan: Plan, out: Path, number: int, of: int, **options: Any) -> bool:
    return write(plan, out, worker=Worker(number, of), fs=Effects(), **options).published


@pytest.mark.parametrize("of", [1, 2, 3, 7, 50])
def test_the_bytes_do_not_depend_on_how_many_or_in_which_order(
    of: int, plan: Plan, clean: dict[str, str], tmp_path: Path
) -> None:
    choose = random.Random(of)
    for _ in range(3):
        out = tmp_path / "moe"
        order = choose.sample(range(1, of + 1), of)
        with_shards = [number for number in order if number <= len(plan.shards)]
        for number in order:
            published = work(plan, out, number, of)
            assert published == (out.exists()) == (number == with_shards[-1] or out.exists())
        assert tree(out) == clean
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
        shutil.rmtree(out)


def test_a_worker_writes_its_share_and_no_more(plan: Plan, tmp_path: Path) -> None:
    written = write(plan, tmp_path / "moe", worker=Worker(2, 3))
    made = {path.name for path in (tmp_path / "moe.partial" / "checkpoint").iterdir()}
    assert made == {shard.name for shard in plan.shards[1::3]}
    assert not written.published and not (tmp_path / "moe").exists()
    assert written.missing == tuple(shard.name for shard in plan.shards if shard.name not in made)
    assert write(plan, tmp_path / "moe", worker=Worker(2, 3)).shards_written == 0


def test_workers_that_are_killed_and_started_again_end_in_the_same_bytes(
    plan: Plan, clean: dict[str, str], tmp_path: Path
) -> None:
    """Seven workers at once, SIGKILL at random moments, until all have come to their ends."""

    class Slow(Effects):
        def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
            time.sleep(0.004)
            return effect(*arguments)

    choose, out = random.Random(0), tmp_path / "moe"
    waiting, rounds, kills = list(range(1, 8)), 0, 0
    while waiting:
        children = {
            number: FORK.Process(target=write, args=(plan, out), kwargs={"worker": Worker(number, 7), "fs": Slow()})
            for number in waiting
        }
        for child in children.values():
            child.start()
        rounds += 1
        if rounds <= 6:
            for number in choose.sample(waiting, len(waiting)):
                time.sleep(choose.uniform(0.0, 0.04))
                children[number].kill()
        for child in children.values():
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
        kills += sum(child.exitcode != 0 for child in children.values())
        waiting = [number for number, child in children.items() if child.exitcode != 0]
    assert kills >= 5
    assert tree(out) == clean
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


@pytest.mark.parametrize("worker", [Worker(1, 1), Worker(2, 2), None])
def test_processes_that_do_the_same_at_once_do_no_harm(
    worker: Worker | None, plan: Plan, clean: dict[str, str], tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    if worker == Worker(2, 2):
        write(plan, tmp_path / "moe", worker=Worker(1, 2))
        (tmp_path / "moe.partial").rename(begun)
    for _ in range(6):
        out = tmp_path / "moe"
        if begun.exists():
            shutil.copytree(begun, tmp_path / "moe.partial")
        children = [FORK.Process(target=write, args=(plan, out), kwargs={"worker": worker}) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert tree(out) == clean
        assert not (tmp_path / "moe.partial").exists()
        shutil.rmtree(out)


def test_overwriting_twice_at_once_loses_nothing(plan: Plan, clean: dict[str, str], tmp_path: Path) -> None:
    for _ in range(6):
        out = tmp_path / "moe"
        write(replace(plan, seed=1), out, overwrite=True)
        children = [FORK.Process(target=write, args=(plan, out), kwargs={"overwrite": True}) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        # One that begins while another clears up may fail; what it then leaves is taken up by the same command.
        assert 0 in [child.exitcode for child in children]
        assert tree(out) == clean
        write(plan, out)
        assert tree(out) == clean
        assert not (tmp_path / "moe.partial").exists()


@pytest.mark.parametrize("n", range(1, 200, 7))
def test_another_may_publish_at_any_moment(n: int, plan: Plan, clean: dict[str, str], tmp_path: Path) -> None:
    """At its n-th effect this process is overtaken by one that does everything and clears up."""

    class Overtaken(Effects):
        def around(self, verb: str, arguments: tuple[Any, ...], effect: Callable[..., Any]) -> Any:
            if self.done == n:
                write(plan, tmp_path / "moe", fs=Effects())
            return effect(*arguments)

    assert write(plan, tmp_path / "moe", worker=Worker(1, 1), fs=Overtaken()).published
    assert tree(tmp_path / "moe") == clean
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_another_plan_on_the_same_output_is_refused(plan: Plan, clean: dict[str, str], tmp_path: Path) -> None:
    other = replace(plan, seed=1)
    work(plan, tmp_path / "moe", 1, 2)
    with pytest.raises(UsageError, match="unfinished output of another command"):
        work(other, tmp_path / "moe", 2, 2)
    assert work(plan, tmp_path / "moe", 2, 2)
    with pytest.raises(UsageError, match="exists"):
        work(other, tmp_path / "moe", 2, 2)
    with pytest.raises(UsageError, match="--overwrite and --worker"):
        work(other, tmp_path / "moe", 2, 2, overwrite=True)
    assert tree(tmp_path / "moe") == clean


def test_of_two_plans_that_begin_at_once_one_is_refused(plan: Plan, clean: dict[str, str], tmp_path: Path) -> None:
    """Both saw that nothing was begun; the name plan.json is taken only once."""
    other = replace(plan, seed=1)

    class Later(FileSystem):
        def rename_new(self, source: Path, target: Path) -> None:
            work(plan, tmp_path / "moe", 1, 2)
            super().rename_new(source, target)

    with pytest.raises(UsageError, match="unfinished output of another command"):
        write(other, tmp_path / "moe", fs=Later())
    assert work(plan, tmp_path / "moe", 2, 2)
    assert tree(tmp_path / "moe") == clean


def test_remains_of_another_plan_are_not_published(plan: Plan, clean: dict[str, str], tmp_path: Path) -> None:
    """A removal that was interrupted may have taken plan.json and left shards, of other names too."""
    work(replace(plan, seed=1, shard_bytes=20_000), tmp_path / "moe", 1, 2)
    work(replace(plan, seed=1), tmp_path / "other", 1, 2)
    shutil.copytree(tmp_path / "other.partial", tmp_path / "moe.partial", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "other.partial")
    (tmp_path / "moe.partial" / "journal" / "plan.json").unlink()
    assert work(plan, tmp_path / "moe", 1, 1)
    assert tree(tmp_path / "moe") == clean


def test_finish_publishes_what_is_complete_and_names_what_is_missing(
    plan: Plan, clean: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "moe"
    with pytest.raises(InputError, match="holds no plan"):
        finish(out)
    work(plan, out, 1, 2, command="moectl upcycle sparse dense -o moe")
    missing = r"lacks \d of \d+ shards: model-00002-of-.*"
    with pytest.raises(InputError, match=missing) as caught:
        finish(out)
    assert "moectl upcycle sparse dense -o moe" in caught.value.fix
    assert not out.exists()

    class Halting(Effects):
        def rename(self, source: Path, target: Path) -> None:
            if target == out:
                raise KeyboardInterrupt
            super().rename(source, target)

    with pytest.raises(KeyboardInterrupt):
        write(plan, out, worker=Worker(2, 2), fs=Halting())
    rotten = tmp_path / "moe.partial" / "checkpoint" / plan.shards[2].name
    content = rotten.read_bytes()
    rotten.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"lacks 1 of \d+ shards: {plan.shards[2].name}"):
        finish(out)
    rotten.write_bytes(content)
    assert finish(out).published
    assert tree(out) == clean
    assert finish(out).published
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_finish_refuses_a_source_that_changed(plan: Plan, dense: Path, tmp_path: Path) -> None:
    work(plan, tmp_path / "moe", 1, 1 + len(plan.shards))
    os.utime(dense / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="changed since it was begun"):
        finish(tmp_path / "moe")


def test_a_snapshot_of_the_hub_is_told_by_its_commit_not_by_times(plan: Plan, dense: Path, tmp_path: Path) -> None:
    """Every machine has its own cache, with its own modification times."""
    source = replace(plan.sources[0], name="org/dense", commit="0" * 40)
    work(replace(plan, sources=(source,)), tmp_path / "moe", 1, 2)
    os.utime(dense / "model.safetensors", ns=(1, 1))
    again = replace(Checkpoint.open(dense), name="org/dense", commit="0" * 40)
    assert work(replace(plan, sources=(again,)), tmp_path / "moe", 2, 2)
    document = json.loads(json.dumps(Journal(replace(plan, sources=(source,)), tmp_path / "x", FileSystem())._state))
    assert document["sources"] == [{"model.safetensors": [source.stats["model.safetensors"][0]]}]


SLURM = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("text", "environment", "worker"),
    [
        ("1/1", {"RANK": "3", "WORLD_SIZE": "4"}, Worker(1, 1)),
        ("3/8", {}, Worker(3, 8)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "4"}, Worker(1, 4)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4", **SLURM}, Worker(4, 4)),
        ("auto", SLURM, Worker(3, 5)),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_STEP": "2"}, Worker(2, 5)),
    ],
)
def test_worker_numbers(text: str, environment: dict[str, str], worker: Worker) -> None:
    assert parse_worker(text, environment) == worker


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        *(
            (text, {}, "neither K/N nor auto")
            for text in ("", "3", "a/b", "1/2/3", "-1/2", "1.0/2", "AUTO", "1/2345678901")
        ),
        *((text, {}, "numbered from 1 to N") for text in ("0/2", "3/2", "0/0", "1/0")),
        ("auto", {}, "found neither RANK and WORLD_SIZE nor SLURM"),
        ("auto", {"RANK": "0"}, "found neither"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2 is impossible"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "2"}, "impossible"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_STEP": "5"}, "does not fit its step"),
        ("auto", {name: SLURM[name] for name in list(SLURM)[:2]}, "SLURM_ARRAY_TASK_COUNT"),
    ],
)
def test_worker_numbers_that_make_no_sense(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_worker(text, environment)


def test_the_commands(dense: Path, tmp_path: Path) -> None:
    def moectl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return subprocess.run(
            [*MOECTL, *arguments], cwd=tmp_path, env={**kept, **environment}, capture_output=True, text=True
        )

    command = ("upcycle", "sparse", "dense", "-o", "moe", "--shard-size", "20kB")
    first = moectl(*command, "--worker", "1/2", "--quiet")
    assert (first.returncode, first.stdout) == (0, "")
    assert "moectl finish" in first.stderr
    document = json.loads(moectl(*command, "--worker", "1/2", "--json").stdout)
    assert document["published"] is False and document["missing"]
    early = moectl("finish", "moe")
    assert (early.returncode, early.stdout) == (3, "")
    assert "moectl upcycle sparse dense -o moe --shard-size 20kB" in early.stderr and "--worker" not in early.stderr
    lost = moectl(*command, "--worker", "auto")
    assert (lost.returncode, lost.stdout) == (2, "")
    last = moectl(*command, "--worker", "auto", RANK="1", WORLD_SIZE="2")
    assert (last.returncode, last.stdout) == (0, "moe\n")
    done = moectl("finish", "moe")
    assert (done.returncode, done.stdout) == (0, "moe\n")
    # RANK is nobody's wish by itself
    whole = moectl(*command[:-3], "other", "--shard-size", "20kB", RANK="1", WORLD_SIZE="2")
    assert whole.stdout == "other\n"
    assert tree(tmp_path / "other") == tree(tmp_path / "moe")
