"""What is written is what was planned; it appears whole or not at all; the same command takes up where it stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trees import arrays_equal, dense_llama, tree

from moectl.checkpoint import writer
from moectl.checkpoint.expressions import Copy, Init
from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.plan import Plan, planned
from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError, MachineError, UsageError
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

RECIPE = SparseRecipe(experts=4, noise=0.01, shard_bytes=10_000)
SMALL = SparseRecipe(experts=3, shard_bytes=10_000)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_llama(tmp_path / "dense")


def plan(dense: Path, recipe: SparseRecipe = SMALL) -> Plan:
    return plan_sparse(Checkpoint.open(dense), recipe)


class Broken(FileSystem):
    """Fails with `error` at the n-th effect of the kind `verb`."""

    def __init__(self, verb: str, n: int, error: OSError) -> None:
        self.verb, self.left, self.error = verb, n, error

    def _count(self, verb: str) -> None:
        if verb == self.verb:
            self.left -= 1
            if self.left == 0:
                raise self.error

    def copy(self, source: int, name: Path, offset: int, nbytes: int, target: int) -> None:
        self._count("copy")
        super().copy(source, name, offset, nbytes, target)

    def sync(self, descriptor: int) -> None:
        self._count("sync")
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename")
        super().rename(source, target)


def test_output_is_what_was_planned(dense: Path, tmp_path: Path) -> None:
    made = plan(dense)
    assert len(made.shards) > 3
    before = tree(dense)
    write(made, tmp_path / "moe")
    found, source = Checkpoint.open(tmp_path / "moe"), Checkpoint.open(dense)
    assert list(found.tensors) == [tensor.name for tensor in made.tensors]
    for tensor in made.tensors:
        ref = found.tensors[tensor.name]
        assert (ref.dtype, ref.shape) == (tensor.dtype, tensor.shape)
        if isinstance(tensor.expression, Copy):
            assert arrays_equal(found.read(tensor.name), source.read(tensor.expression.tensor))
    assert [p.stat().st_size for p in sorted((tmp_path / "moe").glob("*.safetensors"))] == [
        s.nbytes for s in made.shards
    ]
    assert verify_hashes(found).ok
    assert tree(dense) == before
    assert not (tmp_path / "moe.partial").exists()


def test_the_library_opens_it(dense: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write(plan(dense), tmp_path / "moe")
    found = Checkpoint.open(tmp_path / "moe")
    for shard in (tmp_path / "moe").glob("*.safetensors"):
        for name, array in load_file(shard).items():
            assert arrays_equal(array, found.read(name))


def test_side_files_go_along_and_code_does_not(dense: Path, tmp_path: Path) -> None:
    (dense / "modeling_evil.py").write_text("raise SystemExit")
    write(plan(dense), tmp_path / "moe")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()
    assert not (tmp_path / "moe" / "modeling_evil.py").exists()
    provenance = json.loads((tmp_path / "moe" / "moectl.json").read_text())
    assert set(provenance["files"]) == {
        "tokenizer.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors.index.json",
    }
    assert provenance["recipe"]["experts"] == 3


def test_shard_size_changes_files_not_tensors(dense: Path, tmp_path: Path) -> None:
    write(plan(dense), tmp_path / "many")
    write(plan(dense, SparseRecipe(experts=3)), tmp_path / "one")
    many, one = Checkpoint.open(tmp_path / "many"), Checkpoint.open(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert all(arrays_equal(many.read(name), one.read(name)) for name in one.tensors)


def test_noise_is_per_expert_of_the_stated_size_and_seeded(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(plan(dense, SparseRecipe(experts=2, noise=0.05, seed=seed, dtype="float32")), tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    a, c, source = (Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "c"), Checkpoint.open(dense))
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    origin = source.read("model.layers.0.mlp.down_proj.weight").astype("f8")
    noise = [a.read(name.format(e)) - origin for e in (0, 1)] + [c.read(name.format(0)) - origin]
    for difference in noise:
        assert abs(difference.std() - 0.05) < 0.003
    assert abs(noise[0] - noise[1]).max() > 0.05 and abs(noise[0] - noise[2]).max() > 0.05


def test_a_finished_output_of_the_same_plan_is_done(dense: Path, tmp_path: Path) -> None:
    write(plan(dense, RECIPE), tmp_path / "moe")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    assert write(plan(dense, RECIPE), tmp_path / "moe").shards_written == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}


def test_a_finished_output_is_read_again_and_progress_is_told(dense: Path, tmp_path: Path) -> None:
    made, heard = plan(dense), list[int]()
    write(made, tmp_path / "moe")
    assert write(plan(dense), tmp_path / "moe", on_bytes=heard.append).shards_written == 0
    assert sum(heard) == made.nbytes


def test_the_same_recipe_over_other_weights_is_not_done(dense: Path, tmp_path: Path) -> None:
    write(plan(dense, RECIPE), tmp_path / "moe")
    weights = bytearray((dense / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (dense / "model.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match="exists"):
        write(plan(dense, RECIPE), tmp_path / "moe")


def test_existing_outputs_are_kept_unless_told(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    out.mkdir()
    write(plan(dense), out)  # an empty directory is free to take
    with pytest.raises(UsageError, match="exists"):
        write(plan(dense, RECIPE), out)
    assert Checkpoint.open(out).config["num_local_experts"] == 3
    write(plan(dense, RECIPE), out, overwrite=True)
    assert Checkpoint.open(out).config["num_local_experts"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        write(plan(dense), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_output_and_source_never_overlap(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dense)
    for out in (dense, dense / "moe", tmp_path, tmp_path / "link", tmp_path / "link" / "moe"):
        with pytest.raises(UsageError, match="in one another"):
            write(plan(dense), out, overwrite=True)
    assert Checkpoint.open(dense).tensors


@pytest.mark.parametrize("verb", ["copy", "sync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_a_resumable_partial(verb: str, code: int, dense: Path, tmp_path: Path) -> None:
    write(plan(dense, RECIPE), tmp_path / "clean")
    out = tmp_path / "moe"
    for n in (1, 3, 6):
        with pytest.raises(MachineError, match=os.strerror(code)):
            write(plan(dense, RECIPE), out, fs=Broken(verb, n, OSError(code, os.strerror(code), "file")))
        assert not out.exists() and (tmp_path / "moe.partial").exists()
    write(plan(dense, RECIPE), out)
    assert tree(out) == tree(tmp_path / "clean")
    assert not (tmp_path / "moe.partial").exists()


def test_resuming_writes_only_what_is_missing(dense: Path, tmp_path: Path) -> None:
    made = plan(dense)
    with pytest.raises(MachineError):
        write(made, tmp_path / "moe", fs=Broken("copy", 25, OSError(errno.ENOSPC, "full")))
    done = len(list((tmp_path / "moe.partial" / "checkpoint").glob("*.safetensors")))
    assert 1 <= done < len(made.shards)
    assert write(plan(dense), tmp_path / "moe").shards_written == len(made.shards) - done


def test_a_finished_shard_that_rotted_is_written_again(dense: Path, tmp_path: Path) -> None:
    write(plan(dense), tmp_path / "clean")
    with pytest.raises(MachineError):
        write(plan(dense), tmp_path / "moe", fs=Broken("copy", 25, OSError(errno.ENOSPC, "full")))
    shard = sorted((tmp_path / "moe.partial" / "checkpoint").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    write(plan(dense), tmp_path / "moe")
    assert tree(tmp_path / "moe") == tree(tmp_path / "clean")


def test_a_partial_of_another_plan_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        write(plan(dense), tmp_path / "moe", fs=Broken("copy", 9, OSError(errno.ENOSPC, "full")))
    with pytest.raises(UsageError, match="unfinished output of another command"):
        write(plan(dense, RECIPE), tmp_path / "moe")
    write(plan(dense, RECIPE), tmp_path / "moe", overwrite=True)
    assert Checkpoint.open(tmp_path / "moe").config["num_local_experts"] == 4


def test_a_source_that_changed_since_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        write(plan(dense), tmp_path / "moe", fs=Broken("copy", 9, OSError(errno.ENOSPC, "full")))
    os.utime(dense / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="changed since it was begun"):
        write(plan(dense), tmp_path / "moe")


def test_a_source_that_changes_meanwhile_is_not_published(dense: Path, tmp_path: Path) -> None:
    class Touching(FileSystem):
        def sync(self, descriptor: int) -> None:
            os.utime(dense / "model.safetensors", ns=(1, 1))
            super().sync(descriptor)

    with pytest.raises(InputError, match="modified while it was being read"):
        write(plan(dense), tmp_path / "moe", fs=Touching())
    assert not (tmp_path / "moe").exists()


def test_not_enough_disk_is_said_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "free_bytes", lambda _path: 1000)
    with pytest.raises(MachineError, match=r"needs \d+ bytes, but only 1000 are free"):
        write(plan(dense), tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_modes_follow_the_umask(dense: Path, tmp_path: Path) -> None:
    old = os.umask(0o002)
    try:
        write(plan(dense), tmp_path / "moe")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "moe").stat().st_mode) == 0o775
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "moe").iterdir()} == {0o664}


def test_without_copy_file_range_the_bytes_are_the_same(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(plan(dense), tmp_path / "fast")

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write(plan(dense), tmp_path / "slow")
    assert tree(tmp_path / "fast") == tree(tmp_path / "slow")


def test_plans_serialise(dense: Path) -> None:
    made = plan(dense, RECIPE)
    again = Plan.from_json(json.loads(json.dumps(made.to_json())), made.sources)
    assert (again.fingerprint, again.tensors, again.shards) == (made.fingerprint, made.tensors, made.shards)
    assert plan(dense).fingerprint != made.fingerprint
    with pytest.raises(InputError, match="made for other sources"):
        Plan.from_json(made.to_json(), ())


def test_integers_are_copied_and_never_computed(tmp_path: Path) -> None:
    import numpy as np
    from files import checkpoint

    source = Checkpoint.open(checkpoint(tmp_path / "m", {"ids": np.arange(6)}))
    assert planned("ids", Copy("ids"), (source,)).dtype == "I64"
    with pytest.raises(InputError, match="tensor 'ids' is I64, expected one of"):
        planned("ids", Copy("ids"), (source,), "F32")
    assert planned("new", Init((2, 3), 1.0, "new"), (source,), "F32").nbytes == 24


def test_killed_at_random_moments_it_resumes_to_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of the same command, then once to the end: as if nothing had happened."""
    before = tree(dense)
    command = [
        *(sys.executable, "-m", "moectl", "upcycle", "sparse", str(dense), "--experts", "24", "--noise", "0.01"),
        *("--shard-size", "20kB", "--quiet", "-o"),
    ]
    started = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "clean")], check=True, capture_output=True)
    duration = time.perf_counter() - started
    choose = random.Random(0)
    states = set()
    out = tmp_path / "moe"
    for _ in range(20):
        child = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(choose.uniform(0.3, 0.9) * duration)
        child.send_signal(signal.SIGKILL)
        child.wait()
        states.add((out.exists(), out.with_name("moe.partial").exists()))
        if out.exists():
            assert tree(out) == tree(tmp_path / "clean")
            subprocess.run(["rm", "-rf", str(out)], check=True)
    assert (False, True) in states, "no kill hit the writing"
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert tree(out) == tree(tmp_path / "clean")
    assert not out.with_name("moe.partial").exists()
    assert tree(dense) == before
