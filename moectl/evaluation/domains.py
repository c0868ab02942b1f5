"""How well several models predict held-out text: loss, perplexity and bits per byte, domain by domain, side by side.

Every model scores the same texts, document by document. The loss is in nats per token of the model's own tokenizer, so
it compares models that share one; bits per byte of UTF-8 text compare any. Legend: D documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moectl.bootstrap import Interval, interval, resampled_sums
from moectl.data.documents import read_documents
from moectl.errors import InputError, UsageError
from moectl.evaluation.ensemble import Weights, ensemble_log_probabilities
from moectl.text import escape

MEAN = "mean"
MEASURES = ("loss", "perplexity", "bits_per_byte", "difference")

Texts = Mapping[str, Sequence[str]]
"""The documents of each domain."""


@dataclass(frozen=True)
class Scores:
    """What one model, or an ensemble, makes of all documents.

    Attributes:
        tokens: for each domain, the ids of each document; equal ones mean that tokenizers agree.
        log_p: for each domain and document, the log-probability of each token, in nats.
    """

    name: str
    tokens: Mapping[str, list[list[int]]]
    log_p: Mapping[str, list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on one domain, or on average over the domains (where every domain counts the same).

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        bits_per_byte: of the UTF-8 text.
        difference: bits per byte more than the first model's on the same documents; 0 for the first.
        loss_interval, bits_per_byte_interval, difference_interval: 95 % by bootstrap over documents; None where a
            domain has a single document.
        tokens: predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    difference: float
    loss_interval: Interval | None
    bits_per_byte_interval: Interval | None
    difference_interval: Interval | None
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def heldout_texts(specs: Sequence[str], encode: Callable[[str], list[int]], max_tokens: int) -> dict[str, list[str]]:
    """The first held-out documents of every domain, up to about `max_tokens` tokens of each.

    The last document is cut to what is left, at a character in proportion to its tokens, so that every model can be
    given the same text.

    Raises:
        InputError: the data cannot be read, a domain has no held-out document, or one is called `mean`.
    """
    texts: dict[str, list[str]] = {}
    for domain, documents in read_documents(specs, "heldout").by_domain().items():
        if domain == MEAN:
            raise InputError(
                "A domain is called 'mean'.",
                "The mean over the domains has that name.",
                "Rename its file or directory.",
            )
        texts[domain], left = [], max_tokens
        for document in documents:
            count = len(encode(document.text))
            text = document.text if count <= left else document.text[: max(1, len(document.text) * left // count)]
            texts[domain].append(text)
            left -= count
            if left <= 0:
                break
    return texts


def check_members(members: Sequence[Scores]) -> None:
    """Refuse models that cannot be an ensemble; only their names and tokens are looked at.

    Raises:
        UsageError: there are fewer than two, or their tokenizers cut the text differently.
    """
    if len(members) < 2:
        raise UsageError(
            f"An ensemble needs at least two models, and there are {len(members)}.",
            "It averages what specialised models predict.",
            "Give more dense models, or leave --ensemble and --member out.",
        )
    first, *others = members
    for other in others:
        if other.tokens != first.tokens:
            raise UsageError(
                f"{escape(first.name)} and {escape(other.name)} cut the text into different tokens.",
                "An ensemble averages the probabilities of the same next token.",
                "Give models that share a tokenizer, or leave --ensemble out.",
            )


def ensemble(members: Sequence[Scores], weights: Weights) -> Scores:
    """The BTM ensemble (arXiv 2208.03306) of some models' scores, as if it were one more model.

    Raises:
        UsageError: they cannot be one.
    """
    check_members(members)
    tokens = members[0].tokens
    log_p = {
        domain: [
            ensemble_log_probabilities(np.stack([member.log_p[domain][number] for member in members]), weights)
            for number in range(len(documents))
        ]
        for domain, documents in tokens.items()
    }
    return Scores(f"ensemble ({weights})", tokens, log_p)


def measure(models: Sequence[Scores], texts: Texts, seed: int = 0) -> list[dict[str, Measured]]:
    """For each model, every domain and, as `mean`, the average over the domains.

    Raises:
        InputError: a model gives no finite loss.
    """
    counted = {domain: _counted(models, domain, documents) for domain, documents in texts.items()}
    resampled = {
        domain: resampled_sums(values_MD, seed + place) if values_MD.shape[1] > 1 else None
        for place, (domain, values_MD) in enumerate(counted.items())
    }
    results = []
    for index in range(len(models)):
        points = {domain: _statistics(values_MD.sum(1)[None], index) for domain, values_MD in counted.items()}
        drawn = {domain: None if sums is None else _statistics(sums, index) for domain, sums in resampled.items()}
        tokens = {domain: int(values_MD[2 + 2 * index].sum()) for domain, values_MD in counted.items()}
        of_model = {domain: _measured(points[domain], drawn[domain], tokens[domain]) for domain in texts}
        every = [sums for sums in drawn.values() if sums is not None]
        averaged = np.mean(every, axis=0) if len(every) == len(texts) else None
        of_model[MEAN] = _measured(np.mean(list(points.values()), axis=0), averaged, sum(tokens.values()))
        results.append(of_model)
    return results


def _counted(models: Sequence[Scores], domain: str, documents: Sequence[str]) -> np.ndarray:
    """Bytes of each document, then nats and tokens of each model on it: [1 + 2 * models, D]."""
    rows: list[list[float]] = [[len(text.encode()) for text in documents]]
    for model in models:
        nats = [-float(log_p.sum()) for log_p in model.log_p[domain]]
        if not np.isfinite(nats).all():
            raise InputError(
                f"{escape(model.name)} gives no finite loss on {escape(domain)!r}.",
                "Its probabilities are NaN or zero.",
                "Check its weights, or give --dtype float32.",
            )
        rows += [nats, [len(ids) for ids in model.tokens[domain]]]
    return np.array(rows, np.float64)


def _statistics(sums_RM: np.ndarray, index: int) -> np.ndarray:
    """Loss, bits per byte and difference of a model, [3, R], from sums over documents in the order of `_counted`."""
    nats_R, tokens_R = sums_RM[:, 1 + 2 * index], sums_RM[:, 2 + 2 * index]
    bits_per_nat_R = 1 / (sums_RM[:, 0] * math.log(2))
    return np.stack([nats_R / tokens_R, nats_R * bits_per_nat_R, (nats_R - sums_RM[:, 1]) * bits_per_nat_R])


def _measured(points: np.ndarray, drawn: np.ndarray | None, tokens: int) -> Measured:
    loss, bits_per_byte, difference = (float(point) for point in points[:, 0])
    of_loss, of_bits, of_difference = [None] * 3 if drawn is None else [interval(each) for each in drawn]
    perplexity = math.exp(min(loss, 700.0))  # e^710 is no float64
    return Measured(loss, perplexity, bits_per_byte, difference, of_loss, of_bits, of_difference, tokens)
