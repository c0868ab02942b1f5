"""The beginning of `--data` as the tokenizer beside a checkpoint's weights reads it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import read_documents
from moectl.data.tokens import token_batches
from moectl.errors import InputError
from moectl.layerwise.tokenizer import encoder, load_tokenizer, separator


def first_sequences(
    checkpoint: Checkpoint, data: Sequence[str], length: int, most: int, *, why: str, fix: str
) -> np.ndarray:
    """The first token ids of the data's training part, int64 [B, L] with L = `length` and B at most `most`.

    Raises:
        InputError: there is less text than one sequence, `why` that matters, and how to `fix` it; or no tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    packed = token_batches(
        read_documents(data, "train"),
        encoder(tokenizer),
        eos_id=separator(checkpoint, tokenizer),
        sequence_length=length,
        batch_size=most,
    )
    token_BL = next(packed, None)
    if token_BL is None:
        raise InputError(f"The data is shorter than one sequence of {length} tokens.", why, fix)
    return token_BL
