"""HQQ: every expert matrix through `HQQLinear`, which needs no calibration. axis=1, as its fast kernels want it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from plain import MATRIX, run, stored
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def quantise(options: argparse.Namespace) -> None:
    """One matrix at a time from the checkpoint, which is less than loading a model first."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size, axis=1)
    tensors = {}
    for file in sorted(options.model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in filter(MATRIX.fullmatch, opened.offset_keys()):
                weight = opened.get_tensor(name)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                coded = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{leaf}": value.contiguous() for leaf, value in coded.state_dict().items()}
    options.out.mkdir()
    save_file(tensors, options.out / "model.safetensors")


def plain(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Unpacked by HQQ itself."""
    from hqq.core.quantize import HQQLinear

    for module, tensors in stored(out).items():
        coded = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        coded.load_state_dict(tensors)
        yield f"{module}.weight", coded.dequantize()


if __name__ == "__main__":
    run(quantise, plain)
