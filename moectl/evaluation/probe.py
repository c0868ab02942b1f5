"""What became of a language model: held-out loss, and what it writes, domain by domain, beside the model it was.

Loss moves smoothly where writing breaks abruptly (seen of pruned models), so both are looked at. Each model continues
the beginnings of held-out texts, always with its likeliest token. Such text of a sound model is likelier than text that
people wrote, and does not go in circles more than before. Legend: N texts, P tokens given, G tokens written.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MachineError
from moectl.evaluation.heldout import heldout_batches, heldout_loss
from moectl.layerwise.memory import available_memory
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import encoder, load_tokenizer, separator
from moectl.layerwise.whole import device_named, dtype_named, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIVEN = 32
WRITTEN = 64
TEXTS = 8
"""Of a domain that are continued."""
LENGTH, BATCHES = 256, 2
"""Tokens of a held-out text, and batches of `TEXTS` of them that the loss is of."""
GRAM = 4
LEAST_NEW = 0.5
"""Of the share of 4-grams that are new in what the original writes: small models repeat themselves anyway."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One domain.

    Attributes:
        loss_before, loss_after: of held-out text, in nats per token.
        repeated_before, repeated_after: shares of the 4-grams written that came before in the same text.
        surprise_before, surprise_after: loss of what each model wrote, under the original, in nats per token.
    """

    loss_before: float
    loss_after: float
    repeated_before: float
    repeated_after: float
    surprise_before: float
    surprise_after: float

    @property
    def broken(self) -> str:
        """Why what the changed model writes is broken; empty if it is not."""
        if 1 - self.repeated_after < LEAST_NEW * (1 - self.repeated_before):
            return f"{self.repeated_after:.0%} of what it writes is repetition, {self.repeated_before:.0%} before"
        if not self.surprise_after <= self.loss_before:
            return (
                f"to the original what it writes is less likely ({self.surprise_after:.2f} nats per token) than real "
                f"text ({self.loss_before:.2f})"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        """The fields, and what is broken."""
        return {**asdict(self), "broken": self.broken}


def probe_checkpoints(source: Checkpoint, made: Checkpoint, data: Sequence[str], device: str) -> dict[str, Probe]:
    """The probe of two checkpoints that share a tokenizer, on the held-out part of `--data`.

    Raises:
        MachineError: a model would take more than half of the free memory, or there is no such device.
        InputError: a model or the data cannot be used, or the model has too few positions.
    """
    place = device_named(device)
    dtype = dtype_named("auto", place)
    size = 4 * sum(math.prod(ref.shape) for ref in source.tensors.values()) if place.type == "cpu" else source.nbytes
    if size > available_memory() // 2:
        raise MachineError("The model takes more than half of the free memory.")
    length = min(LENGTH, getattr(read_config(source), "max_position_embeddings", None) or LENGTH)
    if length < GIVEN + WRITTEN:
        raise InputError(f"The model has {length} positions, and texts of {GIVEN + WRITTEN} tokens are looked at.")
    tokenizer = load_tokenizer(source)
    batches = heldout_batches(
        data,
        encoder(tokenizer),
        eos_id=separator(source, tokenizer),
        sequence_length=length,
        batch_size=TEXTS,
        max_batches=BATCHES,
    )

    def loaded(checkpoint: Checkpoint) -> PreTrainedModel:
        return load(checkpoint, dtype).to(place)

    with quiet():
        return probe(partial(loaded, source), partial(loaded, made), batches)


def probe(
    original: Callable[[], PreTrainedModel],
    changed: Callable[[], PreTrainedModel],
    batches: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, Probe]:
    """Every domain of some held-out token ids [B, L], L > P; each model is loaded once, and one is there at a time."""
    model = changed()
    loss_after = heldout_loss(model, batches)
    text_after = {domain: written(model, _beginnings(of_domain)) for domain, of_domain in batches.items()}
    del model
    gc.collect()
    model = original()
    loss_before = heldout_loss(model, batches)
    found = {}
    for domain, of_domain in batches.items():
        given_NP = _beginnings(of_domain)
        text_before_NG = written(model, given_NP)
        found[domain] = Probe(
            loss_before[domain],
            loss_after[domain],
            repeated(text_before_NG),
            repeated(text_after[domain]),
            surprise(model, given_NP, text_before_NG),
            surprise(model, given_NP, text_after[domain]),
        )
    return found


@torch.no_grad()
def written(model: PreTrainedModel, given_NP: np.ndarray) -> np.ndarray:
    """The `WRITTEN` likeliest tokens, one after the other, that a model continues texts with: [N, G]."""
    from transformers import GenerationConfig

    token_NP = torch.from_numpy(given_NP).to(model.device)
    # The end is an id that no token has: texts are compared at one length, and without one the model's own would count.
    end = model.get_input_embeddings().num_embeddings
    greedy = GenerationConfig(do_sample=False, max_new_tokens=WRITTEN, eos_token_id=end, pad_token_id=0)
    model.eval()
    output = model.generate(token_NP, attention_mask=torch.ones_like(token_NP), generation_config=greedy)
    return output[:, given_NP.shape[1] :].cpu().numpy()


@torch.no_grad()
def surprise(model: PreTrainedModel, given_NP: np.ndarray, text_NG: np.ndarray) -> float:
    """The loss of texts that follow others, in nats per token of theirs."""
    token_NL = torch.from_numpy(np.concatenate([given_NP, text_NG], axis=1)).to(model.device)
    logits_NLV = model(input_ids=token_NL, use_cache=False).logits
    logits_NGV = logits_NLV[:, given_NP.shape[1] - 1 : -1].float()
    return float(cross_entropy(logits_NGV.flatten(0, 1), token_NL[:, given_NP.shape[1] :].flatten()))


def repeated(text_NG: np.ndarray) -> float:
    """The share of 4-grams that came before in the same text."""
    again = total = 0
    for row in text_NG.tolist():
        grams = list(zip(*(row[start:] for start in range(GRAM)), strict=False))
        again += len(grams) - len(set(grams))
        total += len(grams)
    return again / total


def _beginnings(batches: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(batches))[:TEXTS, :GIVEN]
