"""A byte-level Llama of about a million parameters, trained here and now on text that comes with Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from moectl.data.documents import read_documents
from moectl.data.tokens import BYTE_EOS_ID, BYTE_PAD_ID, byte_tokenizer, token_batches
from moectl.layerwise.quiet import quiet
from moectl.training.loop import train

DATA = ("builtin:code", "builtin:prose", "builtin:arithmetic")
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
LEARNING_RATE = 3e-3


class Trained(TypedDict):
    """What came out of a training: sizes, speed and the mean loss of the last steps in nats per byte."""

    parameters: int
    seconds: float
    tokens_per_second: float
    loss: float


def byte_llama_config() -> LlamaConfig:
    """The shape of the model: five layers of width 128, 989,056 parameters."""
    return LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # The usual 0.02 suits widths of thousands: after 200 steps it leaves a held-out loss of 2.40 instead of 1.96.
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=BYTE_EOS_ID,
        pad_token_id=BYTE_PAD_ID,
    )


def train_byte_llama(
    directory: Path,
    *,
    steps: int = 200,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train the model for `steps` of 4096 bytes and save it to `directory` with its tokenizer, in fp32.

    The same seed on the same machine gives the same weights. torch's global random state is left as it was.

    Raises:
        CheckFailed: the loss is not finite.
    """
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(byte_llama_config())
    batches = token_batches(
        read_documents(DATA, "train"),
        tokenizer.encode,
        eos_id=BYTE_EOS_ID,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        seed=seed,
        repeat=True,
    )
    start = time.perf_counter()
    losses = train(model, batches, steps=steps, learning_rate=LEARNING_RATE, warmup=steps // 10, on_step=on_step)
    seconds = time.perf_counter() - start
    model.generation_config = GenerationConfig(eos_token_id=BYTE_EOS_ID, pad_token_id=BYTE_PAD_ID)
    with quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    last = losses[-10:]
    return Trained(
        parameters=model.num_parameters(),
        seconds=seconds,
        tokens_per_second=steps * BATCH_SIZE * SEQUENCE_LENGTH / seconds,
        loss=sum(last) / len(last),
    )
