"""Hashes of whole directories, and a dense model small enough to be upcycled many times a second."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from files import checkpoint, random_array

from moectl.families.config import normalised
from moectl.families.llama import LLAMA
from moectl.families.shapes import expected_tensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}


def dense_llama(directory: Path, **config: object) -> Path:
    """A random bf16 Llama of a few kilobytes, made without torch, with a tokenizer file beside it."""
    settings = {**CONFIG, **config}
    shapes = expected_tensors(LLAMA, normalised(LLAMA, settings))
    arrays = {name: random_array(shape, "bfloat16", seed) for seed, (name, shape) in enumerate(shapes)}
    checkpoint(directory, arrays, **settings)
    (directory / "tokenizer.json").write_bytes(b'{"not": "ours"}\n')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory and its hash."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def arrays_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
