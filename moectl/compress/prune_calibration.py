"""Where scores come from: a file that holds them, or the model, run on text or looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moectl.checkpoint.kept import identity, kept_name
from moectl.compress.prune_layout import Layout
from moectl.compress.prune_recipe import PruneRecipe, check_subsets
from moectl.compress.prune_scores import Measured, Scores, naee_name, read_scores, require_same_about, write_scores
from moectl.errors import InputError, UsageError
from moectl.text import escape

BUILTIN = ("builtin:code", "builtin:prose", "builtin:arithmetic")
SAMPLES = 128
SEQUENCE_LENGTH = 512

Say = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """The text that experts are chosen on, and how the model sees it; None takes a default.

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
        """What was asked for, as scores say what they were measured on."""
        return {
            "data": list(self.data) if self.data else None,
            "samples": self.samples,
            "seq_len": self.sequence_length,
            "max_tokens": self.max_tokens,
        }


def scores_for(
    layout: Layout, recipe: PruneRecipe, calibration: Calibration, place: Path, file: Path | None, say: Say
) -> Scores | None:
    """How much the experts matter: from `file` if it is there, else measured and kept there, or in `place`.

    None if no expert has to go. `say` hears of what takes time.

    Raises:
        UsageError: the method tries too many subsets, or the options contradict the file.
        InputError: model, data or file cannot be used.
        MachineError: there is no such device, or the Hub cannot be reached.
    """
    kept = recipe.kept(layout)
    if kept == layout.experts:
        return None
    if recipe.method == "naee":
        check_subsets(layout, kept)
    if file is not None and file.exists():
        scores = read_scores(file, layout, recipe.method, kept)
        if "data" in scores.about:
            require_same_about(scores, file, calibration.asked)
        return scores
    if recipe.method == "aimer":
        path = file or place / kept_name("scores", {**identity(layout.source), "statistics": "aimer"})
        if not path.exists():
            from moectl.compress.prune_saliency import weight_scores

            say("Reading the weights of all experts")
            write_scores(path, layout, weight_scores(layout), {})
        return read_scores(path, layout, recipe.method, kept)
    token_BL = _tokens(layout, calibration)
    about = {
        **calibration.asked,
        "data": list(calibration.data or BUILTIN),
        "samples": calibration.samples or SAMPLES,
        "seq_len": token_BL.shape[1],
        "tokens": token_BL.size,
        "dtype": calibration.dtype,
    }
    name = naee_name(kept) if recipe.method == "naee" else "routed"
    tokens = [list(token_BL.shape), hashlib.sha256(token_BL.astype("<i8").tobytes()).hexdigest()]
    decides = {**identity(layout.source), "statistics": name, "tokens": tokens, "about": about}
    path = file or place / kept_name("scores", decides)
    if not path.exists():
        say(f"Choosing experts on {token_BL.size:,} tokens of {', '.join(about['data'])}")
        write_scores(path, layout, _measured(layout, recipe, calibration, token_BL, kept), about)
    return read_scores(path, layout, recipe.method, kept)


def _measured(
    layout: Layout, recipe: PruneRecipe, calibration: Calibration, token_BL: np.ndarray, kept: int
) -> Measured:
    import torch

    from moectl.compress.prune_naee import best_subsets
    from moectl.compress.prune_saliency import routed_scores
    from moectl.layerwise.model import LayerwiseModel
    from moectl.layerwise.skeleton import read_config
    from moectl.layerwise.whole import check_ids, device_named, dtype_named

    device = device_named(calibration.device)
    dtype = dtype_named(calibration.dtype, device)
    if dtype == "auto":
        dtype = getattr(read_config(layout.source), "dtype", None) or torch.float32
    model = LayerwiseModel.open(layout.source, dtype, device)
    check_ids(layout.source, model.model, token_BL)
    if recipe.method == "naee":
        return best_subsets(model, token_BL, layout, kept)
    return routed_scores(model, token_BL, layout)


def _tokens(layout: Layout, calibration: Calibration) -> np.ndarray:
    """The first sequences of the data's training part, [B, L]."""
    from moectl.data.documents import read_documents
    from moectl.data.tokens import token_batches
    from moectl.layerwise.skeleton import read_config
    from moectl.layerwise.tokenizer import encoder, load_tokenizer, separator

    positions = getattr(read_config(layout.source), "max_position_embeddings", None) or SEQUENCE_LENGTH
    length = calibration.sequence_length or min(SEQUENCE_LENGTH, positions)
    if length > positions:
        raise UsageError(
            f"--seq-len {length} is more than the {positions} positions of {escape(layout.source.name)}.",
            "What its experts are given beyond them means nothing.",
            f"Give at most {positions}.",
        )
    samples = calibration.samples or SAMPLES
    if calibration.max_tokens is not None:
        samples = max(1, min(samples, calibration.max_tokens // length))
    tokenizer = load_tokenizer(layout.source)
    packed = token_batches(
        read_documents(calibration.data or BUILTIN, "train"),
        encoder(tokenizer),
        eos_id=separator(layout.source, tokenizer),
        sequence_length=length,
        batch_size=samples,
    )
    token_BL = next(packed, None)
    if token_BL is None:
        raise InputError(
            f"The data is shorter than one sequence of {length} tokens.",
            "How much experts matter cannot be measured on it.",
            "Give --data more text, or a smaller --seq-len.",
        )
    return token_BL
