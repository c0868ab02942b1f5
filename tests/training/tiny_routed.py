"""Trainings with another router, for the tests of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_training as models
from tiny_training import ONE
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moectl.checkpoint.source import Checkpoint
from moectl.data.tokens import BYTE_EOS_ID, BYTE_PAD_ID, byte_tokenizer
from moectl.training.run import train


def trained(source: Path, out: Path, data: tuple[str, ...], router: str | None, **overrides: Any) -> Path:
    """The outcome of a few steps with a router; None for what the model has."""
    losses = {"aux_loss": 0.0, "z_loss": 0.0} if router else {}
    recipe = models.recipe(data, router=router, **{"steps": 3, **losses, **overrides})
    outcome = train(Checkpoint.open(source), recipe, out, ONE)
    assert outcome.step == recipe.steps and outcome.last is not None
    return out


def config(path: Path) -> Any:
    """What config.json says."""
    return json.loads((path / "config.json").read_text())


def save_switch(path: Path, **overrides: Any) -> Path:
    """A tiny Switch Transformer, one sparse layer in each stack, and a byte tokenizer with T5's sentinels."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(8)])
    sizes: dict[str, Any] = {
        "vocab_size": 272,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "expert_capacity": 64,
        "dropout_rate": 0.0,
        "eos_token_id": BYTE_EOS_ID,
        "pad_token_id": BYTE_PAD_ID,
        "decoder_start_token_id": BYTE_PAD_ID,
    }
    SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes | overrides)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
