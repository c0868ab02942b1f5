"""`moectl decompress` of coded files that are damaged: file and tensor are named, and there is no output."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_models import same_tensors, write_coded
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.errors import InputError
from moectl.families.tiny_moe import tiny_moe

NAME = "model.layers.1.mlp.experts.down_proj"
ODD = {"num_hidden_layers": 2, "hidden_size": 20, "moe_intermediate_size": 23, "num_experts": 3}
"""Widths that are multiples of nothing a machine is fond of."""

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coded model; beside it the plain one."""
    return write_coded(tiny_moe("qwen3_moe", **ODD), tmp_path_factory.mktemp("odd"))


def decompressed(coded: Path, out: Path) -> Exception | None:
    error: Any = CliRunner().invoke(app, ["decompress", str(coded), "-o", str(out), "--quiet"]).exception
    return error


def spoilt(whole: Path, place: Path, damage: Damage, *, recorded: bool) -> Path:
    """A copy in which something is wrong; if `recorded`, with the hashes of what it was before."""
    coded = Path(shutil.copytree(whole, place / "coded"))
    if recorded:
        source = Checkpoint.open(coded)
        hashes = {
            name: hashlib.sha256(b"".join(source.chunks(ref))).hexdigest() for name, ref in source.tensors.items()
        }
        document = {"schema": "moectl.provenance/1", "tensors": hashes, "files": {}}
        (coded / "moectl.json").write_text(json.dumps(document))
    tensors = load_file(coded / "model.safetensors")
    damage(tensors)
    save_file(tensors, coded / "model.safetensors", {"format": "pt"})
    return coded


def flipped(part: str, place: int = 0, bit: int = 0) -> Damage:
    """One bit of a byte of one of its tensors."""

    def flip(tensors: Tensors) -> None:
        tensor = tensors[f"{NAME}.{part}"].clone()
        tensor.view(-1).view(torch.uint8)[place] ^= 1 << bit
        tensors[f"{NAME}.{part}"] = tensor

    return flip


@pytest.mark.parametrize("recorded", [False, True])
def test_odd_widths_decode(whole: Path, recorded: bool, tmp_path: Path) -> None:
    coded = spoilt(whole, tmp_path, lambda _tensors: None, recorded=recorded)
    assert decompressed(coded, tmp_path / "out") is None
    assert same_tensors(tmp_path / "out", whole.with_name("plain"))


@pytest.mark.parametrize("part", ["codes", "counts", "levels", "about"])
@pytest.mark.parametrize(("place", "bit"), [(0, 0), (4, 3), (-1, 7)])
def test_no_bit_may_differ_from_what_was_recorded(part: str, place: int, bit: int, whole: Path, tmp_path: Path) -> None:
    """Most bits of codes and levels can flip and still decode, to another model."""
    coded = spoilt(whole, tmp_path, flipped(part, place, bit), recorded=True)
    error = decompressed(coded, tmp_path / "out")
    assert isinstance(error, InputError)
    assert f"coded/model.safetensors: {NAME}.{part} is not what moectl.json records" in error.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "part", "said"),
    [
        (flipped("about", 0, 1), "about", "has version 3"),
        (flipped("about", 5, 0), "about", "there is no code table"),
        (flipped("about", 12, 1), "about", "its flags are 2"),
        (flipped("about", 8, 1), "", "the model's is"),
        (flipped("counts"), "counts", "adds up to"),
        (lambda tensors: tensors.pop(f"{NAME}.levels"), "levels", "is missing"),
        (lambda tensors: tensors.update({f"{NAME}.codes": tensors[f"{NAME}.codes"][:-1].clone()}), "counts", "adds up"),
        (lambda tensors: tensors[f"{NAME}.codes"].view(torch.int16).fill_(-1), "codes", "codewords of row 0"),
    ],
)
def test_without_a_record_what_cannot_be_is_refused(
    damage: Damage, part: str, said: str, whole: Path, tmp_path: Path
) -> None:
    coded = spoilt(whole, tmp_path, damage, recorded=False)
    error = decompressed(coded, tmp_path / "out")
    assert isinstance(error, InputError) and said in error.what
    assert f"{coded / 'model.safetensors'}: {NAME}{'.' * bool(part)}{part}" in error.what
    assert not (tmp_path / "out").exists()


def test_levels_that_are_not_finite_are_refused(whole: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{NAME}.levels"][0, 0, 0] = torch.nan

    error = decompressed(spoilt(whole, tmp_path, spoil, recorded=False), tmp_path / "out")
    assert isinstance(error, InputError) and "experts.0.down_proj.weight" in error.what and "NaN" in error.what
    assert "made from model.layers.1" in error.why


def test_a_shard_that_is_missing_is_named(whole: Path, tmp_path: Path) -> None:
    coded = spoilt(whole, tmp_path, lambda _tensors: None, recorded=False)
    tensors = load_file(coded / "model.safetensors")
    (coded / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + (NAME in name)}-of-00002.safetensors" for name in tensors}
    (coded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    first = {name: tensor for name, tensor in tensors.items() if NAME not in name}
    save_file(first, coded / "model-00001-of-00002.safetensors", {"format": "pt"})
    error = decompressed(coded, tmp_path / "out")
    assert isinstance(error, InputError) and "model-00002-of-00002.safetensors does not exist" in error.what


def test_a_tensor_that_is_missing_leaves_nothing_half_decoded(whole: Path, tmp_path: Path) -> None:
    """Of a matrix whose tensor about.* is gone, the others are tensors that no model knows."""
    coded = spoilt(whole, tmp_path, lambda tensors: tensors.pop(f"{NAME}.about"), recorded=False)
    error = decompressed(coded, tmp_path / "out")
    assert isinstance(error, InputError) and f"{NAME}.about" in error.what and not (tmp_path / "out").exists()
