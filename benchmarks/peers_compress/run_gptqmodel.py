"""GPTQModel's GPTQ on experts alone, its defaults otherwise: `act_group_aware`, round-to-nearest where tokens are few.

On a machine of few cores loading stops at "Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has
1": `GPTQMODEL_CPU_WORKERS=4` is in its environment.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from plain import run, stored
from torch import Tensor

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
BATCH = 8
"""Sequences at once: faster than its default of 1."""


def quantise(options: argparse.Namespace) -> None:
    """Load, calibrate and save packed."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=options.symmetric,
        dynamic={r"-:.*self_attn.*": {}},
    )
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(options.tokens)]
    model = GPTQModel.load(str(options.model), config)
    model.quantize(rows, batch_size=BATCH)
    model.save(str(options.out))


def plain(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Unpacked as its torch kernel does: codes of `bits` in int32, input channels first; a group for each input."""
    config = json.loads((out / "quantize_config.json").read_text())
    bits = config["bits"]
    offset = 1 if config["format"] == "gptq" else 0  # that format stores zero points less one
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    for module, each in stored(out).items():
        code_NR = ((each["qweight"][:, None] >> shifts[:, None]) & mask).flatten(0, 1)
        zero_GR = (((each["qzeros"][:, :, None] >> shifts) & mask) + offset).flatten(1)
        group_N = each["g_idx"].long()
        weight_NR = (code_NR - zero_GR[group_N]).float() * each["scales"].float()[group_N]
        yield f"{module}.weight", weight_NR.T


if __name__ == "__main__":
    run(quantise, plain)
