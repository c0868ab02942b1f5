"""A model with coded experts on a GPU computes what it does on a CPU, by kernels and by decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="codes are read and written by numba, which a machine with a GPU may be without")

from coded_models import write_coded

from moectl.codecs import grid
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.integrations import transformers as ours
from moectl.integrations.qmoe.arrays import tensor_of
from moectl.integrations.qmoe.coded import Coded


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_coded_model(family: str, tmp_path: Path) -> None:
    coded = write_coded(tiny_moe(family), tmp_path)
    model = ours.load(coded)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.cuda()
        found = [model(**{name: ids.cuda() for name, ids in inputs.items()})[0].cpu()]
        if family != "llama4_text":
            model.set_experts_implementation("eager")
            found.append(model(**{name: ids.cuda() for name, ids in inputs.items()})[0].cpu())
    for output in found:
        assert (output - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_grid(bits: int) -> None:
    """Bit for bit as on a CPU."""
    draw = np.random.default_rng(bits)
    scales = draw.uniform(0.05, 0.1, (3, 40, 5)).astype(np.float16)
    zeros = draw.integers(0, 1 << bits, (3, 40, 5), np.uint8)
    blob = grid.pack(draw.integers(0, 1 << bits, (3, 40, 130), np.uint8), scales, zeros, bits, 26, "w")
    parts = {name.removeprefix("w."): tensor_of(array) for name, array in blob.tensors().items()}
    coded = Coded("w", parts, blob.shape, torch.float16)
    which = torch.tensor([0, 2])
    expected = coded(which)
    assert torch.equal(expected[[0, 2]], tensor_of(blob.weights())[[0, 2]]) and not expected[1].any()
    assert torch.equal(coded.cuda()(which.cuda()).cpu(), expected)
