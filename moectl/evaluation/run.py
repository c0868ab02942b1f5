"""What `moectl eval` does: choose texts, load one model after the other, score, and put the results together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.evaluation.domains import Measured, Scores, check_members, ensemble, heldout_texts, measure
from moectl.evaluation.harness import run_tasks
from moectl.families.components import experts_and_top_k
from moectl.integrations.implementation import set_experts
from moectl.layerwise.quiet import quiet
from moectl.layerwise.scoring import log_probabilities
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import encoder, load_tokenizer, prefix
from moectl.layerwise.whole import check_ids, device_named, dtype_named, load
from moectl.text import escape, shown

SEQUENCE_LENGTH = 1024


@dataclass(frozen=True)
class Settings:
    """What to measure; the options of `moectl eval`. No data measures tasks alone.

    `members` are those of the ensemble, among the models; all dense ones when empty.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    ensemble: bool = False
    members: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int = 32768
    sequence_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    experts_implementation: str | None = None
    seed: int = 0
    revision: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `moectl eval` reports.

    Attributes:
        names: of the models, then of the ensembles.
        documents: how many there are of each domain.
        members: the models of the ensembles.
        results: for each name, every domain and the mean; empty without data.
        tasks: for each model, the metrics of each task; empty without tasks.
    """

    settings: Settings
    names: list[str]
    documents: dict[str, int]
    members: list[str]
    results: list[dict[str, Measured]]
    tasks: list[dict[str, dict[str, float]]]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        entries = []
        for index, name in enumerate(self.names):
            is_model = index < len(self.settings.models)
            entry: dict[str, Any] = {
                "name": name,
                "model": self.settings.models[index] if is_model else None,
                "members": None if is_model else self.members,
            }
            if self.results:
                entry["domains"] = {domain: measured.to_json() for domain, measured in self.results[index].items()}
            if self.tasks and is_model:
                entry["tasks"] = self.tasks[index]
            entries.append(entry)
        return {
            "data": list(self.settings.data),
            "documents": self.documents,
            "max_tokens": self.settings.max_tokens,
            "seed": self.settings.seed,
            "models": entries,
        }


def run(settings: Settings, say: Callable[[str], None] = lambda _text: None) -> Evaluation:
    """Measure all models on the same texts, with one in memory at a time; `say` hears of each.

    Raises:
        UsageError: the options contradict each other, or the models cannot be an ensemble.
        InputError: a model or the data cannot be used.
        MachineError: no such device, the Hub cannot be reached, or the harness is not installed.
    """
    device = device_named(settings.device)
    dtype = dtype_named(settings.dtype, device)
    checkpoints = [Checkpoint.open(model, settings.revision) for model in settings.models]
    names = labels(settings.models)
    chosen = _members(settings, names, checkpoints)
    tokenizers = [load_tokenizer(checkpoint) for checkpoint in checkpoints]
    texts: dict[str, list[str]] = {}
    if settings.data:
        texts = heldout_texts(settings.data, encoder(tokenizers[0]), settings.max_tokens)
    tokens = [
        {domain: [encoder(tokenizer)(text) for text in documents] for domain, documents in texts.items()}
        for tokenizer in tokenizers
    ]
    if settings.ensemble:  # refused before a model is loaded
        check_members([Scores(names[index], tokens[index], {}) for index in chosen])
    scores, tasks = [], []
    for name, checkpoint, tokenizer, ids in zip(names, checkpoints, tokenizers, tokens, strict=True):
        say(f"Measuring {name}")
        model = _loaded(checkpoint, dtype, device, settings.experts_implementation)
        if texts:
            log_p = _log_p(checkpoint, model, ids, prefix(checkpoint, tokenizer), settings.sequence_length)
            scores.append(Scores(name, ids, log_p))
        if settings.tasks:
            tasks.append(run_tasks(model, tokenizer, settings.tasks, limit=settings.limit, seed=settings.seed))
        del model
        gc.collect()
    members = [names[index] for index in chosen] if settings.ensemble else []
    if settings.ensemble:
        experts = [scores[index] for index in chosen]
        scores += [ensemble(experts, "uniform"), ensemble(experts, "posterior")]
    return Evaluation(
        settings,
        names + [each.name for each in scores[len(names) :]],
        {domain: len(documents) for domain, documents in texts.items()},
        members,
        measure(scores, texts, settings.seed) if texts else [],
        tasks,
    )


def labels(models: Sequence[str]) -> list[str]:
    """A different name for each model: its last part where that is enough, else all of it, numbered if need be."""
    short = [model.rstrip("/").rpartition("/")[2] or model for model in models]
    names = [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def _members(settings: Settings, names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[int]:
    """Which of the models the ensemble is made of."""
    if not settings.members:
        return [index for index, each in enumerate(checkpoints) if not experts_and_top_k(each.config)[0]]
    places: list[int] = []
    for member in settings.members:
        asked = member.rstrip("/")
        found = [i for i, model in enumerate(settings.models) if asked in (model.rstrip("/"), names[i])]
        if len(found) != 1 or found[0] in places:
            raise UsageError(
                f"--member {shown(member)!r} is {'named twice' if found else 'none of the models'}.",
                "An ensemble is made of models that are measured anyway.",
                f"Name each once, of {', '.join(map(escape, names))}.",
            )
        places += found
    return places


def _log_p(
    checkpoint: Checkpoint, model: Any, tokens: Mapping[str, list[list[int]]], prefix_id: int, length: int | None
) -> dict[str, list[np.ndarray]]:
    check_ids(checkpoint, model, (ids for documents in tokens.values() for ids in documents))
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or SEQUENCE_LENGTH
    if length is not None and length > positions:
        raise UsageError(
            f"--seq-len {length} is more than the {positions} positions of {escape(checkpoint.name)}.",
            "What it predicts beyond them means nothing.",
            f"Give at most {positions}.",
        )
    window = min(SEQUENCE_LENGTH, positions) if length is None else length
    with quiet():
        return {domain: log_probabilities(model, ids, prefix_id, window) for domain, ids in tokens.items()}


def _loaded(checkpoint: Checkpoint, dtype: Any, device: torch.device, experts: str | None) -> Any:
    if read_config(checkpoint).is_encoder_decoder:
        raise InputError(
            f"{escape(checkpoint.name)} is an encoder-decoder.",
            "It predicts one text from another, not each token of a text from those before it.",
            "Give decoder-only models.",
        )
    with quiet():
        model = load(checkpoint, dtype)
        if experts is not None:
            set_experts(model, experts, checkpoint.name)
    return model.to(device)
