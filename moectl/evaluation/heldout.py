"""Loss on text the model was not trained on: nats per token, domain by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from moectl.data.documents import read_documents
from moectl.data.tokens import token_batches
from moectl.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEAN = "mean"


def heldout_batches(
    specs: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    eos_id: int,
    sequence_length: int,
    batch_size: int,
    max_batches: int,
) -> dict[str, list[np.ndarray]]:
    """The first held-out token ids of every domain of `--data`: at most `max_batches` batches `[B, L]` of each.

    Raises:
        InputError: a domain has no held-out document, or too few for a single sequence.
    """
    batches = {}
    for domain, documents in read_documents(specs, "heldout").by_domain().items():
        packed = token_batches(documents, encode, eos_id=eos_id, sequence_length=sequence_length, batch_size=batch_size)
        batches[domain] = list(islice(packed, max_batches))
        if not batches[domain]:
            raise InputError(
                f"The held-out text of {domain!r} is shorter than one sequence of {sequence_length} tokens.",
                "There is nothing to measure the loss on.",
                "Give more documents or a shorter sequence length.",
            )
    return batches


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, batches: Mapping[str, Iterable[np.ndarray]]) -> dict[str, float]:
    """Mean next-token cross-entropy in nats per token, for each domain and, as `mean`, over the domains.

    Every predicted token of a domain counts the same, and every domain counts the same in the mean. A balancing loss is
    no part of it. The model is measured in evaluation mode and handed back in the mode it came in.

    Args:
        batches: for each domain, token ids `[B, L]` with L >= 2.

    Raises:
        InputError: a domain is called `mean`, like the entry that is added.
    """
    if MEAN in batches:
        raise InputError(
            "A domain is called 'mean'.", "The mean over the domains has that name.", "Rename its file or directory."
        )
    was_training = model.training
    model.eval()
    try:
        losses = {domain: _loss(model, of_domain) for domain, of_domain in batches.items()}
    finally:
        model.train(was_training)
    return {**losses, MEAN: sum(losses.values()) / len(losses)}


def _loss(model: PreTrainedModel, batches: Iterable[np.ndarray]) -> float:
    total, predicted = 0.0, 0
    for batch in batches:
        token_BL = torch.from_numpy(batch).to(model.device)
        logits_BLV = model(input_ids=token_BL, use_cache=False).logits
        target = token_BL[:, 1:].flatten()
        total += cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), target, reduction="sum").item()
        predicted += target.numel()
    return total / predicted
