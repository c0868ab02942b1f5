"""The log-probability a model gives to every token of some documents, each token once.

Legend: B windows, L tokens each, V vocabulary, N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
_LOGITS = 1 << 27
"""Most logits at once: 512 MiB in fp32, unless a single window has more."""

_Window = tuple[int, int]
"""Which document, and the place of the window's first predicted token in it."""


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], prefix_id: int, sequence_length: int
) -> list[np.ndarray]:
    """For each document of token ids, the log-probability [N] of each, in nats, as float64.

    The first token follows `prefix_id`. A document longer than `sequence_length` is cut into windows that share one
    token, the context of the next window's first, so every token is predicted once. Short windows are padded on the
    right, where no causal model looks. The model is measured in evaluation mode and handed back in the mode it came in.
    """
    result = [np.empty(len(document), np.float64) for document in documents]
    windows = [(i, start) for i, ids in enumerate(documents) for start in range(0, len(ids), sequence_length)]

    def length(window: _Window) -> int:
        return min(sequence_length, len(documents[window[0]]) - window[1])

    vocabulary = model.get_input_embeddings().num_embeddings
    most = min(BATCH_TOKENS, _LOGITS // vocabulary)
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sorted(windows, key=length, reverse=True), length, most):
            longest = length(batch[0])
            token_BL = torch.full((len(batch), longest + 1), prefix_id)
            for row, (number, start) in enumerate(batch):
                ids = [prefix_id, *documents[number][start : start + longest]]
                if start:
                    ids[0] = documents[number][start - 1]
                token_BL[row, : len(ids)] = torch.tensor(ids)
            log_p_BL = _of_next_tokens(model, token_BL.to(model.device))
            for row, (number, start) in enumerate(batch):
                count = length(batch[row])
                result[number][start : start + count] = log_p_BL[row, :count]
    finally:
        model.train(was_training)
    return result


def _batches(windows: list[_Window], length: Callable[[_Window], int], most: int) -> Iterator[list[_Window]]:
    """Windows, longest first, in groups whose padded size is at most `most` tokens, or of one window."""
    batch: list[_Window] = []
    for window in windows:
        if batch and length(batch[0]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _of_next_tokens(model: PreTrainedModel, token_BL: Tensor) -> np.ndarray:
    """log p of every token but the first of each row, [B, L - 1]."""
    logits_BLV = model(input_ids=token_BL[:, :-1], use_cache=False).logits
    rows = []
    for logits_LV, next_L in zip(logits_BLV, token_BL[:, 1:], strict=True):
        log_p_LV = logits_LV.float().log_softmax(-1)
        rows.append(log_p_LV.gather(1, next_L[:, None])[:, 0].double().cpu().numpy())
    return np.stack(rows)
