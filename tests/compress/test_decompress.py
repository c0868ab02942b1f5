"""`moectl decompress` as it is used: shown, carried out, interrupted, again, and told wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from coded_models import add, random_blob, same_tensors, write_coded
from qmoe_runs import names
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trees import tree
from typer.testing import CliRunner

from moectl.checkpoint import writer
from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.compress.decoding import Decoding
from moectl.compress.dense import DensePart
from moectl.errors import InputError, MachineError, UsageError
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.integrations import transformers as ours

SHARD = "200kB"
"""Less than a layer, and no multiple of one."""


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with coded experts; beside it the plain one."""
    return write_coded(tiny_moe("mixtral"), tmp_path_factory.mktemp("mixtral"))


def decompress(coded: Path, out: Path, *arguments: Any) -> Result:
    return CliRunner().invoke(app, ["decompress", str(coded), "-o", str(out), *map(str, arguments)])


def test_the_result_is_the_plain_checkpoint(coded: Path, tmp_path: Path) -> None:
    """Its path on stdout, its shards as asked, nothing left beside it; and it loads without moectl."""
    done = decompress(coded, tmp_path / "out", "--shard-size", "1MB")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'out'}\n"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    plain = AutoModelForCausalLM.from_pretrained(coded.with_name("plain"))
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(found(**tiny_inputs(found))[0], plain(**tiny_inputs(plain))[0])
    assert len(Checkpoint.open(tmp_path / "out").stats) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "decompressed" in card and "import moectl" not in card


def test_it_is_shown_before_it_is_done(coded: Path, tmp_path: Path) -> None:
    """A dry run decodes and writes nothing, and says the names, shapes and bytes of what would be there."""
    shown = decompress(coded, tmp_path / "out", "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    decompress(coded, tmp_path / "out")
    told = json.loads(shown.stdout)
    there = Checkpoint.open(tmp_path / "out")
    assert {each["name"]: tuple(each["shape"]) for each in told["plan"]["tensors"]} == {
        name: ref.shape for name, ref in there.tensors.items()
    }
    assert told["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_it_resumes_where_it_was(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is not decoded again, no layer twice in a run, and the output is that of a run undisturbed."""
    decoded: list[str] = []
    decode = Decoding.decode

    def interrupted(self: Decoding, layer: str) -> Any:
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(layer)
        return decode(self, layer)

    assert decompress(coded, tmp_path / "clean", "--shard-size", SHARD).exit_code == 0
    monkeypatch.setattr(Decoding, "decode", interrupted)
    assert decompress(coded, tmp_path / "out", "--shard-size", SHARD).exit_code != 0
    assert not (tmp_path / "out").exists() and names(tmp_path) == ["clean", "out.partial"]
    monkeypatch.setattr(Decoding, "decode", lambda self, layer: decoded.append(layer) or decode(self, layer))
    assert decompress(coded, tmp_path / "out", "--shard-size", SHARD).exit_code == 0
    assert decoded[2:] == [f"model.layers.{layer}" for layer in (1, 2)]
    assert tree(tmp_path / "out") == tree(tmp_path / "clean") and names(tmp_path) == ["clean", "out"]


def test_run_again_it_finds_its_output_whole_or_says_so(coded: Path, tmp_path: Path) -> None:
    """It is done, unless a byte is missing or another one; and an output of other options is another's."""
    out = tmp_path / "out"
    assert decompress(coded, out).exit_code == 0
    again = decompress(coded, out)
    assert again.exit_code == 0 and again.stdout == f"{out}\n" and "already complete" in again.stderr
    assert names(tmp_path) == ["out"]
    assert isinstance(decompress(coded, out, "--dtype", "bfloat16").exception, UsageError)
    whole = (out / "model.safetensors").read_bytes()
    for spoilt in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"F32", b"I32")):
        (out / "model.safetensors").write_bytes(spoilt)
        error = decompress(coded, out).exception
        assert isinstance(error, UsageError) and "exists" in error.what and "--overwrite" in error.fix
    assert decompress(coded, out, "--overwrite").exit_code == 0
    assert (out / "model.safetensors").read_bytes() == whole


def test_workers_make_the_bytes_of_one(coded: Path, tmp_path: Path) -> None:
    """Whoever comes last publishes what one process makes; `finish` knows what is missing."""
    assert decompress(coded, tmp_path / "one", "--shard-size", SHARD).exit_code == 0
    for worker in ("2/3", "3/3", "1/3"):
        assert decompress(coded, tmp_path / "three", "--shard-size", SHARD, "--worker", worker).exit_code == 0
        assert (tmp_path / "three").exists() == (worker == "1/3")
        finished = CliRunner().invoke(app, ["finish", str(tmp_path / "three")])
        assert finished.exit_code == 0 if worker == "1/3" else "shards: model-00001" in str(finished.exception)
    assert tree(tmp_path / "three") == tree(tmp_path / "one") and names(tmp_path) == ["one", "three"]


def test_the_disk_has_to_hold_the_output_alone(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the shards nothing is ever written that is as large as a layer."""
    large: set[Path] = set()
    decode = Decoding.decode

    def looked(self: Decoding, layer: str) -> Any:
        large.update(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000)
        return decode(self, layer)

    monkeypatch.setattr(Decoding, "decode", looked)
    assert decompress(coded, tmp_path / "out", "--shard-size", SHARD).exit_code == 0
    assert large and all("model-000" in path.name and path.suffix == ".safetensors" for path in large)


def test_in_another_type(coded: Path, tmp_path: Path) -> None:
    assert decompress(coded, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    found, plain = (load_file(each / "model.safetensors") for each in (tmp_path / "out", coded.with_name("plain")))
    assert found.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name].bfloat16()) for name, tensor in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_lies_as_in_memory_is_taken_apart_too(tmp_path: Path) -> None:
    """Names of checkpoints that were saved as they are in memory become those of the family."""
    coded = write_coded(tiny_moe("mixtral"), tmp_path)
    on_disk, in_memory = (f"model.layers.1.{block}.gate.weight" for block in ("block_sparse_moe", "mlp"))
    add(coded, {in_memory: load_file(coded / "model.safetensors")[on_disk]}, without=[on_disk])
    assert decompress(coded, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", tmp_path / "plain")


def test_with_a_dense_part_of_4_bits(tmp_path: Path) -> None:
    """What was packed comes out as the weights that the packed model computes with."""
    model = tiny_moe("qwen3_moe")
    coded = write_coded(model, tmp_path)
    tensors = DensePart(4).take("", model, lambda name: ".experts." in name)
    assert len(tensors) > 20
    add(coded, tensors, without=DensePart(4).taken("", model, lambda name: ".experts." in name))
    assert decompress(coded, tmp_path / "out").exit_code == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = ours.load(coded, experts_implementation="eager")(**tiny_inputs(found))[0]
        assert (found(**tiny_inputs(found))[0] - expected).norm() <= 1e-5 * expected.norm()


def test_what_cannot_be_done_is_said(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is not coded, or damaged; a place that is taken or too small; a type nobody knows."""
    plain = coded.with_name("plain")
    for arguments, kind, words in (
        ((plain, tmp_path / "out"), InputError, "is not coded"),
        ((coded, plain), UsageError, "exists"),
        ((coded, coded / "inside"), UsageError, "are in one another"),
        ((coded, tmp_path / "out", "--dtype", "int3"), UsageError, "not known"),
        ((coded, tmp_path / "out", "--export", "w5a16"), UsageError, "not known"),
    ):
        error = decompress(*arguments).exception
        assert isinstance(error, kind) and words in str(error)
    with monkeypatch.context() as small:
        small.setattr(writer, "free_bytes", lambda _path: 1_000_000)
        error = decompress(coded, tmp_path / "out").exception
        assert isinstance(error, MachineError) and "but only 1000000 are free" in str(error)
    name = "model.layers.2.mlp.experts.down_proj"
    other = write_coded(tiny_moe("mixtral"), tmp_path / "damaged")
    blob = random_blob(name, (8, 64, 95), np.random.default_rng(0), transposed=False)
    add(other, {each: torch.from_numpy(array) for each, array in blob.tensors().items()})
    error = decompress(other, tmp_path / "out").exception
    assert isinstance(error, InputError) and f"model.safetensors: {name} is [8, 64, 95]" in str(error)
    assert not (tmp_path / "out").exists()
