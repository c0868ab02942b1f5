"""Are two checkpoints the same function? Their fp32 logits on random token ids, side by side.

Random ids are enough to tell functions apart and need no tokenizer; a sequence longer than every attention
window makes the windows count too. Shapes: L tokens, R of them at a time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.layerwise.memory import available_memory
from moectl.layerwise.model import LayerwiseModel
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.whole import load
from moectl.text import escape

MIN_TOKENS = 64
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Config fields that limit how far back a token looks."""

Run = Callable[[Checkpoint, Tensor], Tensor]
"""From token ids [1, L] to a checkpoint's logits [1, L, V]."""

CHUNK_NUMBERS = 1 << 22
"""How many logits are compared at once in float64: 32 MiB for each of a handful of temporaries."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's fp32 logits are from a reference's.

    Attributes:
        tokens: length of the one sequence compared.
        seed: what its ids were drawn with.
        max_abs: largest |difference| of two logits.
        max_logit: largest |logit| of the reference.
        relative: max_abs / max_logit.
        argmax_agreement: share of positions where both predict the same token, 0 to 1.
        kl: mean over positions of KL(reference || model), in nats.
        layerwise: whether the models were run one layer at a time.
    """

    tokens: int
    seed: int
    max_abs: float
    max_logit: float
    relative: float
    argmax_agreement: float
    kl: float
    layerwise: bool

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def markdown(self, reference: str) -> str:
        """The comparison as a paragraph for a model card."""
        return (
            f"Against `{escape(reference)}` in fp32 on {self.tokens} random tokens (seed {self.seed}): largest logit "
            f"difference {self.max_abs:.2g} of a largest logit of {self.max_logit:.3g} (relative {self.relative:.2g}), "
            f"same next token at {self.argmax_agreement:.1%} of positions, mean KL divergence {self.kl:.2g} nats."
        )


def compare(
    model: Checkpoint,
    reference: Checkpoint,
    *,
    tokens: int | None = None,
    seed: int = 0,
    layerwise: bool | None = None,
) -> Comparison:
    """Compare the logits of two checkpoints that share a vocabulary, with one model in memory at a time.

    An encoder-decoder gets the same ids on both sides, and is always run whole unless told otherwise.

    Args:
        model: the checkpoint in question.
        reference: what it should equal.
        tokens: length of the sequence; by default longer than any attention window, as `default_tokens` says.
        seed: seed of the token ids.
        layerwise: run one layer at a time from disk; by default if either, in fp32, exceeds half of free memory.

    Raises:
        InputError: the vocabularies differ, or a checkpoint does not load completely, cannot take that many
            tokens, or gives logits that mean nothing.
    """
    whole = [read_config(checkpoint) for checkpoint in (model, reference)]
    configs = [config.get_text_config(decoder=True) for config in whole]
    vocab_size = _common_vocab_size(model, reference, *configs)
    length = default_tokens(*configs) if tokens is None else tokens
    ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    if layerwise is None:
        layerwise = (
            not any(config.is_encoder_decoder for config in whole)
            and max(_fp32_bytes(model), _fp32_bytes(reference)) > available_memory() // 2
        )
    run = _layerwise_logits if layerwise else _whole_logits
    expected_LV = _finite_logits(run, reference, ids)
    actual_LV = _finite_logits(run, model, ids)
    max_logit = expected_LV.abs().max().item()
    if max_logit == 0:
        raise _meaningless(reference, "gives only zero logits")
    max_abs, agreement, kl = _difference(actual_LV, expected_LV)
    return Comparison(length, seed, max_abs, max_logit, max_abs / max_logit, agreement, kl, layerwise)


def default_tokens(*configs: PreTrainedConfig) -> int:
    """The least multiple of 16 that is at least 64 and exceeds every attention window by 16 or more.

    Never more than the smallest `max_position_embeddings`: what a model does beyond it means nothing.
    """
    windows = [getattr(config, name, None) or 0 for config in configs for name in WINDOWS]
    positions = [getattr(config, "max_position_embeddings", None) or math.inf for config in configs]
    wanted = max(MIN_TOKENS, 16 * math.ceil((max(windows) + 16) / 16))
    return int(min(wanted, *positions))


def _common_vocab_size(
    model: Checkpoint, reference: Checkpoint, ours: PreTrainedConfig, theirs: PreTrainedConfig
) -> int:
    if ours.vocab_size != theirs.vocab_size:
        raise InputError(
            f"{escape(model.name)} has a vocabulary of {ours.vocab_size} tokens, "
            f"{escape(reference.name)} one of {theirs.vocab_size}.",
            "Their logits cannot be compared one by one.",
            "Compare models that share a tokenizer and have the same `vocab_size`.",
        )
    return ours.vocab_size


def _fp32_bytes(checkpoint: Checkpoint) -> int:
    return sum(4 * math.prod(ref.shape) for ref in checkpoint.tensors.values())


def _layerwise_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    return LayerwiseModel.open(checkpoint).logits(ids)


def _whole_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    model = load(checkpoint)
    with torch.no_grad():
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, use_cache=False, **decoder).logits
    checkpoint.check_unchanged()
    return logits


def _finite_logits(run: Run, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """The logits [L, V] of the one sequence `ids` [1, L], all of them finite numbers."""
    try:
        with quiet():
            logits = run(checkpoint, ids)
    except IndexError as error:  # learned position embeddings end; rotary ones do not
        raise InputError(
            f"{escape(checkpoint.name)} cannot take a sequence of {ids.shape[1]} tokens.",
            "It has learned position embeddings, and none for so late a position.",
            "Compare fewer tokens (`--tokens`).",
        ) from error
    if not torch.isfinite(logits).all():
        raise _meaningless(checkpoint, "gives logits that are NaN or infinite")
    return logits[0]


def _meaningless(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{escape(checkpoint.name)} {what} on random tokens.",
        "A comparison with them would say nothing.",
        "Check its weights and its config.json.",
    )


def _difference(actual_LV: Tensor, expected_LV: Tensor) -> tuple[float, float, float]:
    """(largest |difference|, share of equal argmax, mean KL(expected || actual) in nats), in float64."""
    rows = max(1, CHUNK_NUMBERS // actual_LV.shape[1])
    max_abs, agreeing, kl = 0.0, 0, 0.0
    for actual_RV, expected_RV in zip(actual_LV.split(rows), expected_LV.split(rows), strict=True):
        actual_RV, expected_RV = actual_RV.double(), expected_RV.double()
        max_abs = max(max_abs, (actual_RV - expected_RV).abs().max().item())
        agreeing += int((actual_RV.argmax(-1) == expected_RV.argmax(-1)).sum())
        log_p_RV, log_q_RV = expected_RV.log_softmax(-1), actual_RV.log_softmax(-1)
        kl += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
    length = len(actual_LV)
    return max_abs, agreeing / length, max(0.0, kl / length)  # rounding can leave a KL of 0 just below it
