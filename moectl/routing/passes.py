"""Running a model over a batch, pass by pass: causal, encoder-decoder, with generation, or layer by layer.

Each is an iterator that stops after every pass, so that what was seen in it can be taken.

Legend: B rows, L tokens, R = B * L, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.layerwise.model import LayerwiseModel
from moectl.routing.batches import Batch, prefixed
from moectl.routing.recorder import Rows
from moectl.traces.trace import DECODE

Pass = tuple[Mapping[str, Rows], Tensor | None]
"""The rows of each stream, and the most likely next token [R] of the decoder's if asked for."""

Passes = Callable[[Batch], Iterator[Pass]]


def causal(model: Any, prefix_id: int, *, predicted: bool) -> Passes:
    """One pass per batch, every row after the prefix."""
    few = {} if predicted or "logits_to_keep" not in inspect.signature(model.forward).parameters else _LAST

    def run(batch: Batch) -> Iterator[Pass]:
        given = prefixed(batch, prefix_id)
        logits_BLV = model(input_ids=_tensor(given, model), use_cache=False, **few).logits
        yield {"decoder": given.rows}, logits_BLV.argmax(-1).flatten() if predicted else None

    return run


def encoder_decoder(model: Any, start_id: int, *, predicted: bool) -> Passes:
    """One pass per batch: the encoder reads the rows, and the decoder the same ones from its start token on."""

    def run(batch: Batch) -> Iterator[Pass]:
        given = prefixed(batch, start_id)
        output = model(input_ids=_tensor(batch, model), decoder_input_ids=_tensor(given, model), use_cache=False)
        rows = {"encoder": batch.rows, "decoder": given.rows}
        yield rows, output.logits.argmax(-1).flatten() if predicted else None

    return run


def generating(model: Any, prefix_id: int, count: int) -> Passes:
    """A pass over the rows, which must be of one length, and one for each of `count` tokens that are the likeliest."""

    def run(batch: Batch) -> Iterator[Pass]:
        given = prefixed(batch, prefix_id)
        rows, token_BL, cache = given.rows, _tensor(given, model), None
        document_B, length = batch.rows.document_R.reshape(batch.token_BL.shape)[:, 0], batch.token_BL.shape[1]
        for step in range(count + 1):
            output = model(input_ids=token_BL, past_key_values=cache, use_cache=True)
            cache, predicted_BL = output.past_key_values, output.logits.argmax(-1)
            yield {"decoder": rows}, predicted_BL.flatten()
            token_BL = predicted_BL[:, -1:]
            position_B = np.full(len(document_B), length + step, np.int32)
            rows = Rows(document_B, position_B, token_BL[:, 0].cpu().numpy(), DECODE)

    return run


def layer_by_layer(model: LayerwiseModel, prefix_id: int, device: torch.device) -> Passes:
    """One pass per batch, with one layer in memory at a time; the head is not read, so nothing is predicted."""

    def run(batch: Batch) -> Iterator[Pass]:
        given = prefixed(batch, prefix_id)
        model.run(torch.from_numpy(given.token_BL).to(device))
        yield {"decoder": given.rows}, None

    return run


_LAST = {"logits_to_keep": 1}


def _tensor(batch: Batch, model: Any) -> Tensor:
    return torch.from_numpy(batch.token_BL).to(model.device)
