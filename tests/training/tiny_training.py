"""Tiny models with a byte tokenizer, and what the tests of training do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.families.tiny import tiny_model
from moectl.families.tiny_moe import tiny_moe
from moectl.training.recipe import TrainRecipe
from moectl.training.world import World

ONE = World(0, 1, torch.device("cpu"))
SIZES: dict[str, Any] = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": BYTE_EOS_ID, "num_hidden_layers": 2}

COUNTING = {
    "deepseek-v3:bias_rate=0.5": 2,
    "minimax-01:capacity_factor=0.7,aux_loss=1": 1,
    "quantile": 2,
    "remoe:aux_loss=0.1": 2,
    "thor:k=8": 1,
}
"""Routers that count over the processes of a training, and THOR's two passes, of all experts so that nothing is drawn;
and in how many micro-batches one process does what two do."""


def save_moe(path: Path, model_type: str = "qwen3_moe", **overrides: Any) -> Path:
    """A tiny MoE on disk."""
    return save(tiny_moe(model_type, initializer_range=0.05, **SIZES | overrides), path)


def save_dense(path: Path, **overrides: Any) -> Path:
    """A tiny Llama on disk."""
    return save(tiny_model("llama", initializer_range=0.05, **SIZES | overrides), path)


def save(model: Any, path: Path) -> Path:
    """A model and a byte tokenizer on disk."""
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_data(directory: Path) -> tuple[str, str]:
    """Two small sources, each with documents in both splits."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, word in (("numbers", "{0} + {0} = {1}. "), ("words", "The {0}th of the {1} words is here. ")):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{(word * 3).format(at, 2 * at)}"}}\n' for at in range(200)))
        paths.append(str(path))
    return paths[0], paths[1]


def recipe(data: tuple[str, ...], **overrides: Any) -> TrainRecipe:
    """A short training with everything on that a family without selection biases has."""
    given: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 32,
        "accumulate": 2,
        "learning_rate": 3e-3,
        "warmup": 2,
        "z_loss": 1e-3,
    }
    return TrainRecipe(data=data, **given | overrides)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of one file."""
    return load_file(path / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same bits."""
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def routed_recipe(data: tuple[str, ...], router: str, accumulate: int = 1) -> TrainRecipe:
    """Two steps with another router."""
    return recipe(data, router=router, accumulate=accumulate, steps=2, warmup=0, z_loss=0.0, aux_loss=0.0)


def named(router: str) -> str:
    """A directory for what comes out of it."""
    return f"routed-{router.partition(':')[0]}"
