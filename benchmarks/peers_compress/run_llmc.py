"""llm-compressor's GPTQ on experts alone, as its examples have it: `GPTQModifier`, every expert given all tokens."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from plain import run, stored
from torch import Tensor

BATCH = 8
"""Sequences at once; all have one length, so nothing is cut. Faster than its default of 1."""


def quantise(options: argparse.Namespace) -> None:
    """Load, calibrate and save packed."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    _forget_unimportable()
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    token_SL = np.load(options.tokens)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in token_SL]
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.symmetric,
        "strategy": "group",
        "group_size": options.group_size,
    }
    modifier = GPTQModifier(
        config_groups={"experts": {"targets": [r"re:.*mlp\.experts\.\d+\..*_proj$"], "weights": weights}}
    )
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier,
        max_seq_length=token_SL.shape[1],
        num_calibration_samples=len(token_SL),
        batch_size=BATCH,
    )
    model.save_pretrained(options.out, save_compressed=True)


def _forget_unimportable() -> None:
    """Loading looks at every module of transformers, and stops at aliases of modules that need torchvision."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers"):
            try:
                dir(module)
            except ImportError:
                del sys.modules[name]


def plain(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Unpacked by compressed-tensors itself."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    for module, tensors in stored(out).items():
        yield f"{module}.weight", compressor.decompress(tensors, scheme)["weight"]


if __name__ == "__main__":
    run(quantise, plain)
