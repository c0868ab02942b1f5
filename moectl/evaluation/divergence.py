"""How far a changed model is from the one it was, token by token: what it predicts, and which experts it takes.

Loss can stay where it is while the model becomes another; the Kullback-Leibler divergence of its predictions from the
original's cannot. The original's logits wait in a file, so that one model at a time is in memory.

Legend: B sequences, L tokens each, V vocabulary, R rows at a time, K experts of a token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moectl.bootstrap import Interval, interval, resampled_sums
from moectl.layerwise.experts import choice, takes_choice

MEAN = "mean"
MOST_BYTES = 1 << 30
"""Of the original's logits, in fp32."""
CHUNK_NUMBERS = 1 << 22
"""How many logits are compared at once in float64: 32 MiB for each of a handful of temporaries."""

Batches = Mapping[str, np.ndarray]
"""The token ids [B, L] of each domain."""

_Choices = dict[str, Tensor]
"""By the name of an experts module: which experts each token takes, [L, K], in the order of their numbers."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What became of the predictions on one domain.

    Attributes:
        tokens: positions that were compared.
        kl: mean of KL(original || changed), in nats per token.
        kl_interval: 95 % by bootstrap over sequences; None of a single one.
        same_next: share of positions where both find the same next token likeliest.
    """

    tokens: int
    kl: float
    kl_interval: Interval | None
    same_next: float


@dataclass(frozen=True)
class Divergence:
    """All domains, and as `mean` their average, where every domain counts the same.

    Attributes:
        domains: by name.
        rerouted: for each experts module that both models have, the share of tokens that take another set of experts.
    """

    domains: dict[str, Drift]
    rerouted: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def divergence(
    before: Callable[[], PreTrainedModel], after: Callable[[], PreTrainedModel], batches: Batches, seed: int = 0
) -> Divergence:
    """Load one model after the other and compare what they make of the same tokens."""
    with TemporaryDirectory() as place:
        record = Record.of(before(), batches, Path(place) / "logits.npy")
        gc.collect()
        return record.against(after(), batches, seed)


@dataclass(frozen=True)
class Record:
    """What a model made of some tokens: its logits [all tokens, V] in a file, and its choices for each sequence."""

    file: Path
    choices: list[_Choices]

    @classmethod
    def of(cls, model: PreTrainedModel, batches: Batches, file: Path) -> Record:
        """Run the model on every sequence; `file` is written, as a .npy of float32."""
        tokens = sum(token_BL.size for token_BL in batches.values())
        shape = (tokens, model.get_output_embeddings().weight.shape[0])
        logits_NV = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        choices, start = [], 0
        for _, logits_LV, taken in _passes(model, batches):
            logits_NV[start : start + len(logits_LV)] = logits_LV.cpu().numpy()
            choices.append(taken)
            start += len(logits_LV)
        logits_NV.flush()
        return cls(file, choices)

    def against(self, model: PreTrainedModel, batches: Batches, seed: int = 0) -> Divergence:
        """Run another model on the same sequences and compare."""
        logits_NV = np.load(self.file, mmap_mode="r")
        # for each domain a list of sequences' (sum of KL, positions with the same likeliest token, positions)
        sums: dict[str, list[tuple[float, int, int]]] = {domain: [] for domain in batches}
        moved: dict[str, int] = {}
        seen: dict[str, int] = {}
        start = 0
        passes = _passes(model, batches)
        for (domain, logits_LV, taken), known in zip(passes, self.choices, strict=True):
            expected_LV = torch.from_numpy(logits_NV[start : start + len(logits_LV)].copy())
            sums[domain].append((*_difference(logits_LV.cpu(), expected_LV), len(logits_LV)))
            start += len(logits_LV)
            for name in known.keys() & taken.keys():
                moved[name] = moved.get(name, 0) + int((known[name] != taken[name]).any(-1).sum())
                seen[name] = seen.get(name, 0) + len(known[name])
        rerouted = {name: moved[name] / seen[name] for name in self.choices[0] if name in seen}
        return Divergence(_drifts(sums, seed), rerouted)


def _drifts(sums: Mapping[str, list[tuple[float, int, int]]], seed: int) -> dict[str, Drift]:
    found, drawn = {}, []
    for place, (domain, of_domain) in enumerate(sums.items()):
        values_MB = np.array(of_domain, np.float64).T
        kl, same, tokens = values_MB.sum(1)
        between = None
        if len(of_domain) > 1:
            sums_RM = resampled_sums(values_MB, seed + place)
            drawn.append(sums_RM[:, 0] / sums_RM[:, 2])
            between = interval(drawn[-1])
        found[domain] = Drift(int(tokens), float(kl / tokens), between, float(same / tokens))
    each = list(found.values())
    found[MEAN] = Drift(
        sum(drift.tokens for drift in each),
        float(np.mean([drift.kl for drift in each])),
        interval(np.mean(drawn, axis=0)) if len(drawn) == len(each) else None,
        float(np.mean([drift.same_next for drift in each])),
    )
    return found


def _difference(actual_LV: Tensor, expected_LV: Tensor) -> tuple[float, int]:
    """The sum of KL(expected || actual) in nats, and at how many positions both have the same largest logit."""
    rows = max(1, CHUNK_NUMBERS // actual_LV.shape[1])
    kl, same = 0.0, 0
    for actual_RV, expected_RV in zip(actual_LV.split(rows), expected_LV.split(rows), strict=True):
        same += int((actual_RV.argmax(-1) == expected_RV.argmax(-1)).sum())
        log_p_RV, log_q_RV = expected_RV.double().log_softmax(-1), actual_RV.double().log_softmax(-1)
        kl += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
    return max(0.0, kl), same  # rounding can leave a KL of 0 just below it


@torch.no_grad()
def _passes(model: PreTrainedModel, batches: Batches) -> Iterator[tuple[str, Tensor, _Choices]]:
    """For each sequence its domain, its logits [L, V] in fp32 and its choices."""
    was_training = model.training
    model.eval()
    try:
        with _watched(model) as taken:
            for domain, token_BL in batches.items():
                for token_L in token_BL:
                    token_1L = torch.from_numpy(token_L)[None].to(model.device)
                    logits_LV = model(input_ids=token_1L, use_cache=False).logits[0].float()
                    yield domain, logits_LV, dict(taken)
                    taken.clear()
    finally:
        model.train(was_training)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Choices]:
    """Inside, what the experts modules are told to compute is written down."""
    taken: _Choices = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            taken[name] = choice(module, given, named)[1].sort(-1).values.cpu()

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if takes_choice(module)
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
