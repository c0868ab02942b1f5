"""The text that a model is looked at on before it is made smaller: what was asked for, and its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from moectl.checkpoint.source import Checkpoint
from moectl.data import documents
from moectl.errors import UsageError
from moectl.layerwise.pairs import Ids, parts
from moectl.text import escape

SAMPLES = 128
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """The text that a model is looked at on, and how it sees it; None takes a default.

    Attributes:
        data: as `--data` has it.
        samples, sequence_length: how many sequences, of how many tokens.
        max_tokens: of all sequences together.
        device, dtype: where and in what the model computes.
    """

    data: tuple[str, ...] | None = None
    samples: int | None = None
    sequence_length: int | None = None
    max_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, as statistics say what they were measured on."""
        return {
            "data": list(self.data) if self.data else None,
            "samples": self.samples,
            "seq_len": self.sequence_length,
            "max_tokens": self.max_tokens,
        }

    def about(self, tokens: Ids) -> dict[str, Any]:
        """What was taken, with the defaults filled in; `tokens` are those of all sequences, targets too."""
        return {
            **self.asked,
            "data": list(self.data or documents.EVERY_BUILTIN),
            "samples": self.samples or SAMPLES,
            **{key: part.shape[1] for key, part in zip(("seq_len", "target_len"), parts(tokens), strict=False)},
            "tokens": sum(part.size for part in parts(tokens)),
            "dtype": self.dtype,
        }


def calibration_tokens(source: Checkpoint, calibration: Calibration) -> np.ndarray:
    """The first sequences of the data's training part, [B, L].

    Raises:
        UsageError: the sequences are longer than the model's positions, or than `max_tokens` of the calibration.
        InputError: there is less text than one sequence, or no tokenizer.
    """
    from moectl.layerwise.first_text import first_sequences
    from moectl.layerwise.skeleton import read_config

    positions = getattr(read_config(source).get_text_config(decoder=True), "max_position_embeddings", None)
    most = calibration.max_tokens
    length = calibration.sequence_length or min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH, most or SEQUENCE_LENGTH)
    if most is not None and length > most:
        raise UsageError(
            f"--max-tokens {most} is less than one sequence of {length} tokens.",
            "",
            "Give more, or a smaller --seq-len.",
        )
    if positions and length > positions:
        raise UsageError(
            f"--seq-len {length} is more than the {positions} positions of {escape(source.name)}.",
            "What its experts are given beyond them means nothing.",
            f"Give at most {positions}.",
        )
    samples = calibration.samples or SAMPLES
    if most is not None:
        samples = min(samples, most // length)
    return first_sequences(
        source,
        calibration.data or documents.EVERY_BUILTIN,
        length,
        samples,
        why="How the model's experts are used cannot be measured on it.",
        fix="Give --data more text, or a smaller --seq-len.",
    )


def tokens_identity(token_BL: np.ndarray) -> list[Any]:
    """Shape and hash of token ids: what tells one calibration from another."""
    return [list(token_BL.shape), hashlib.sha256(token_BL.astype("<i8").tobytes()).hexdigest()]
