"""Opening a checkpoint checks everything that can be known without weights, and never leaves its directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import checkpoint, random_array, safetensors_bytes

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MachineError, UsageError

TWO = {
    "model-00001-of-00002.safetensors": {"a": random_array((2, 3))},
    "model-00002-of-00002.safetensors": {"b": random_array((4,), "bfloat16")},
}
INDEX = "model.safetensors.index.json"


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(path)
    assert message in caught.value.what, caught.value.what


def edit_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps({**index, **changes}))


def test_reads_what_the_library_reads(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    opened = Checkpoint.open(path)
    for tensors in TWO.values():
        for name, array in tensors.items():
            assert np.array_equal(opened.read(name), array)
            assert opened.read(name).dtype == array.dtype
    assert opened.nbytes == 2 * 3 * 4 + 4 * 2


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/abs.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "a/../../b.safetensors",
        "x\0.safetensors",
        ".hidden.safetensors",
        "sub/x.safetensors",
        "x.txt",
    ],
)
def test_index_never_leads_outside(shard: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": random_array((2, 3))}))
    edit_index(path, weight_map={"a": shard})
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watching else None)
    watching = True
    refused(path, "not a file beside it")
    watching = False
    assert not [name for name in opened if Path(name).suffix == ".safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([1], "has no `weight_map` object"),
        ({}, "has no `weight_map` object"),
        ({"a": 1}, "not a file name"),
        ({"a": "pytorch_model.bin"}, "is a pickle"),
        ({"a": "gone.safetensors"}, "does not exist, but the index names it"),
        ({"a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}, "places 'c'"),
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "but no shard holds it"),
    ],
)
def test_index_must_match_the_shards(weight_map: object, message: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    edit_index(path, weight_map=weight_map)
    refused(path, message)


def test_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", {"model-1.safetensors": {"a": random_array((2,)), "b": random_array((2,))}})
    edit_index(path, weight_map={"a": "model-1.safetensors"})
    refused(path, "holds 'b', which the index does not list")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path / "two", {"m-1.safetensors": {"a": random_array((2,))}, "m-2.safetensors": {"b": random_array((2,))}}
    )
    (path / "m-2.safetensors").write_bytes(safetensors_bytes({"a": random_array((2,)), "b": random_array((2,))}))
    refused(path, "holds tensor 'a', which m-1.safetensors holds too")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_broken_json_names_the_file(name: str, text: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    (path / name).write_text(text)
    refused(path, name)


def test_wrong_total_size_is_only_a_warning(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    edit_index(path, metadata={"total_size": 1})
    assert "total_size of 1 bytes, but the tensors have 32" in Checkpoint.open(path).warnings[0]


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    refused(path, "is a pickle, which is never opened")
    assert not (tmp_path / "marker").exists()
    assert "save_pretrained" in _error(path).fix


def test_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dcp"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / ".metadata").write_bytes(b"x")
    refused(path, "torch.distributed checkpoint")


def _error(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(path)
    return caught.value


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json does not exist")
    (tmp_path / "file.safetensors").write_bytes(b"")
    refused(tmp_path / "file.safetensors", "is not a directory")
    refused(tmp_path / "none", "does not exist")
    with pytest.raises(InputError, match=r"\./none does not exist"):
        Checkpoint.open("./none")


def test_revisions_belong_to_the_hub(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "two", TWO)
    with pytest.raises(UsageError, match="is on disk"):
        Checkpoint.open(path, revision="main")
    with pytest.raises(UsageError, match="names a revision and"):
        Checkpoint.open("hf://org/name@main", revision="v1")


def test_hub_models_come_from_the_cache_and_keep_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached snapshot (symlinks into blobs/) opens offline; what is not cached is the network's fault, exit 4."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    made = checkpoint(tmp_path / "made", TWO)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in made.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    opened = Checkpoint.open("hf://org/name@main")
    assert (opened.commit, opened.name, set(opened.tensors)) == (commit, "org/name", {"a", "b"})
    with pytest.raises(MachineError, match="could not be fetched"):
        Checkpoint.open("org/other")


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "one", {"a": random_array((2, 3))})
    opened = Checkpoint.open(path)
    opened.check_unchanged()
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(InputError, match="ended while tensor 'a' was read"):
        opened.read("a")
    with pytest.raises(InputError, match="was modified while it was being read"):
        opened.check_unchanged()
