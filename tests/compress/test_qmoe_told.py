"""The bits that `moectl compress qmoe` tells are those of the bytes in its files, wherever it tells them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qmoe_runs import COUNTING, EXPERTS, LAYERS, SMALL, compress, made_moe, memory, strict, texts
from safetensors.torch import load_file, save_file

from moectl.checkpoint.source import Checkpoint

WEIGHTS = 3 * 32 * 32
"""Of an expert."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A model of whose experts in the first layer one is nothing but zeros, and text."""
    with memory() as directory:
        made_moe(directory / "moe")
        file = directory / "moe" / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".layers.0.mlp.experts.3." in name:
                tensor.zero_()
        save_file(tensors, file, {"format": "pt"})
        texts(directory / "counting.jsonl", COUNTING)
        yield directory


@pytest.fixture(
    params=[(), ("--symmetric",), ("--code", "qmoe"), ("--bits", 3, "--group-size", 16), ("--export", "w4a16")]
)
def made(request: pytest.FixtureRequest, place: Path) -> Iterator[tuple[Path, dict[str, Any], str, str]]:
    """An output, and what was told of it: as JSON, on the terminal and as a page."""
    options = (*SMALL, *request.param, "--group-size", 32) if "--export" in request.param else (*SMALL, *request.param)
    with memory() as room:
        done = compress(
            place / "moe", room / "q", *options, "--json", "--html", room / "page", data=place / "counting.jsonl"
        )
        assert done.exit_code == 0, done.exception
        yield room / "q", strict(done.stdout), done.stderr, (room / "page").read_text()


def test_what_is_told_is_what_is_stored(made: tuple[Path, dict[str, Any], str, str]) -> None:
    out, told, terminal, page = made
    of_layer = [0] * LAYERS
    for name, ref in Checkpoint.open(out).tensors.items():
        if ".mlp.experts." in name:
            of_layer[int(name.split(".")[2])] += ref.nbytes
    kept = json.loads((out / "compression.json").read_text())["layers"]
    for layer, nbytes in enumerate(of_layer):
        experts = told["layers"][layer]["experts"]
        assert len(experts) == EXPERTS
        assert round(sum(each["bits"] for each in experts) * WEIGHTS) == 8 * nbytes
        matrices = kept[layer]["matrices"]
        per_matrix = zip(matrices["bits"], matrices["rows"], matrices["columns"], strict=True)
        assert round(sum(bits * rows * columns for bits, rows, columns in per_matrix)) == 8 * nbytes
        mean = 8 * nbytes / EXPERTS / WEIGHTS
        assert told["layers"][layer]["bits"] == pytest.approx(mean, rel=1e-12)
        assert f"{mean:.3f}" in terminal and f">{float(f'{mean:.4g}')}<" in page
    whole = 8 * sum(of_layer) / (LAYERS * EXPERTS * WEIGHTS)
    assert told["bits_per_expert_parameter"] == whole
    if told["rate"] is not None:
        assert told["rate"]["achieved"] == pytest.approx(whole, rel=1e-12)
    assert f"{whole:.3f} bits per expert weight" in " ".join(terminal.split())
    assert f"| {whole:.3f} |" in (out / "README.md").read_text()


def test_an_expert_without_weights_takes_less_than_others(place: Path) -> None:
    """Its rows are short, though the table of its stack was made for others."""
    with memory() as room:
        done = compress(place / "moe", room / "q", *SMALL, "--json", data=place / "counting.jsonl")
        bits = torch.tensor([expert["bits"] for expert in strict(done.stdout)["layers"][0]["experts"]])
        assert bits.argmin() == 3
