"""What compressing did to a language model, on held-out text: loss before and after, drift of predictions, rerouting.

Each of the two models is loaded once, and one of them is in memory at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MachineError
from moectl.evaluation.divergence import MOST_BYTES, Divergence, Record
from moectl.evaluation.domains import Measured, Scores, heldout_texts, measure
from moectl.layerwise.memory import available_memory
from moectl.layerwise.quiet import quiet
from moectl.layerwise.scoring import log_probabilities
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import encoder, load_tokenizer, prefix, separator
from moectl.layerwise.whole import device_named, dtype_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 512
HELDOUT_TOKENS, DRIFT_TOKENS = 16_384, 2_048
"""Of each domain: what loss is of, and what predictions are compared on."""


@dataclass(frozen=True)
class Change:
    """Before and after.

    Attributes:
        before, after: of each domain and, as `mean`, on average; `difference` of `after` is what was lost.
        divergence: of predictions and choices of experts.
    """

    before: Mapping[str, Measured]
    after: Mapping[str, Measured]
    divergence: Divergence

    def to_json(self) -> dict[str, Any]:
        """For each domain loss, perplexity and drift; for each experts module the share of tokens rerouted."""
        domains = {
            domain: {
                "before": before.to_json(),
                "after": self.after[domain].to_json(),
                "drift": self.divergence.to_json()["domains"][domain],
            }
            for domain, before in self.before.items()
        }
        return {"domains": domains, "rerouted": self.divergence.rerouted}


def change(
    source: Checkpoint,
    made: Checkpoint,
    data: Sequence[str],
    load: Callable[[Checkpoint, Any], PreTrainedModel],
    *,
    device: str = "auto",
    seed: int = 0,
) -> Change:
    """Compare a checkpoint with what it was made from, on the held-out part of `--data`; tokens are the source's.

    Args:
        load: a whole model of a checkpoint, in a type of torch or "auto".

    Raises:
        MachineError: a model would take more than half of the free memory, or there is no such device.
        InputError: a model or the data cannot be used, or the model is no decoder.
    """
    place = device_named(device)
    dtype = dtype_named("auto", place)
    config = read_config(source)
    if config.is_encoder_decoder:
        raise InputError("The model is an encoder-decoder, and predicts no text by itself.")
    size = 4 * sum(math.prod(ref.shape) for ref in source.tensors.values()) if place.type == "cpu" else source.nbytes
    if size > available_memory() // 2:
        raise MachineError("The model takes more than half of the free memory.")
    text_config = config.get_text_config(decoder=True)
    length = min(LENGTH, getattr(text_config, "max_position_embeddings", None) or LENGTH)
    tokenizer = load_tokenizer(source)
    encode, first = encoder(tokenizer), prefix(source, tokenizer)
    texts = heldout_texts(data, encode, HELDOUT_TOKENS)
    ids = {domain: [encode(text) for text in documents] for domain, documents in texts.items()}
    most = MOST_BYTES // (4 * text_config.vocab_size * len(ids))
    batches = packed(ids, separator(source, tokenizer), length, min(DRIFT_TOKENS, most))
    scores = []
    with TemporaryDirectory() as scratch, quiet():
        for checkpoint in (source, made):
            model = load(checkpoint, dtype).to(place)
            log_p = {domain: log_probabilities(model, documents, first, length) for domain, documents in ids.items()}
            scores.append(Scores(checkpoint.name, ids, log_p))
            if len(scores) == 1:
                record = Record.of(model, batches, Path(scratch) / "logits.npy")
            else:
                diverged = record.against(model, batches, seed)
            del model
            gc.collect()
    before, after = measure(scores, texts, seed)
    return Change(before, after, diverged)


def packed(ids: Mapping[str, list[list[int]]], end: int, length: int, tokens: int) -> dict[str, np.ndarray]:
    """The first `tokens` of each domain's documents, one after the other, as sequences [B, L]; L at most `length`."""
    batches = {}
    for domain, documents in ids.items():
        stream = np.array([token for document in documents for token in (*document, end)], np.int64)
        width = min(length, len(stream))
        count = max(1, min(tokens, len(stream)) // width)
        batches[domain] = stream[: count * width].reshape(count, width)
    return batches
