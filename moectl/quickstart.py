"""The story in one command: train a small dense model, upcycle it, check it, load it, compare before and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import CheckFailed, UsageError
from moectl.evaluation.compare import compare, load
from moectl.evaluation.heldout import heldout_batches, heldout_loss
from moectl.evaluation.inspect import inspect
from moectl.layerwise.quiet import quiet
from moectl.training.byte_llama import BATCH_SIZE, DATA, SEQUENCE_LENGTH, train_byte_llama
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

TOLERANCE = 1e-5
HELDOUT_BATCHES = 6


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models: where it is and what it is like. Losses are nats per byte, by domain."""

    path: str
    parameters: int
    active_parameters: int
    bytes: int
    seconds: float
    heldout_loss: dict[str, float]


@dataclass(frozen=True, slots=True)
class Story:
    """What `moectl quickstart` reports."""

    dense: Side
    moe: Side
    experts: int
    top_k: int
    training_tokens: int
    max_logit_difference: float
    relative_difference: float
    argmax_agreement: float
    seconds: float


def quickstart(
    directory: Path,
    *,
    steps: int,
    seed: int,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _text: None,
    on_step: Callable[[int, float], None] | None = None,
) -> Story:
    """Make `directory`/dense and `directory`/moe and compare them; `say` hears of every stage.

    Raises:
        UsageError: `directory` exists and `overwrite` is not given, or it holds something else.
        CheckFailed: the two models are not the same function.
    """
    started = perf_counter()
    dense, moe = directory / "dense", directory / "moe"
    _make_room(directory, overwrite)
    recipe = SparseRecipe(experts=8, top_k=2, seed=seed)

    say(f"Training a byte-level Llama for {steps} steps on text that comes with Python.")
    trained = train_byte_llama(dense, steps=steps, seed=seed, on_step=on_step)

    say(f"Upcycling it to {recipe.experts} experts, {recipe.top_k} active per token.")
    upcycling = perf_counter()
    write(plan_sparse(Checkpoint.open(dense), recipe), moe)
    upcycling = perf_counter() - upcycling

    say("Verifying: hashes of every tensor, then the logits of both models.")
    opened = Checkpoint.open(moe)
    comparison = compare(opened, Checkpoint.open(dense), seed=seed)
    if not (verify_hashes(opened).ok and comparison.relative <= TOLERANCE):
        raise CheckFailed(f"{moe} is not the function of {dense}.", f"{comparison}", "Please report this: it is a bug.")

    say("Loading both with AutoModelForCausalLM and measuring the loss on held-out text.")
    return Story(
        dense=_side(dense, trained["seconds"]),
        moe=_side(moe, upcycling),
        experts=recipe.experts,
        top_k=recipe.top_k,
        training_tokens=steps * BATCH_SIZE * SEQUENCE_LENGTH,
        max_logit_difference=comparison.max_abs,
        relative_difference=comparison.relative,
        argmax_agreement=comparison.argmax_agreement,
        seconds=perf_counter() - started,
    )


def rows(story: Story) -> list[tuple[str, Any, Any]]:
    """The before/after table: (measure, dense, MoE)."""
    dense, moe = story.dense, story.moe
    losses = [
        (f"held-out loss, {domain} (nats/byte)", f"{dense.heldout_loss[domain]:.4f}", f"{moe.heldout_loss[domain]:.4f}")
        for domain in dense.heldout_loss
    ]
    return [
        ("parameters", f"{dense.parameters:,}", f"{moe.parameters:,}"),
        ("active per token", f"{dense.active_parameters:,}", f"{moe.active_parameters:,}"),
        ("bytes", f"{dense.bytes:,}", f"{moe.bytes:,}"),
        *losses,
        ("max |logit difference|", "", f"{story.max_logit_difference:.2g}"),
        ("  relative to max |logit|", "", f"{story.relative_difference:.2g}"),
        ("  same next byte", "", f"{story.argmax_agreement:.1%}"),
        ("seconds to make", f"{dense.seconds:.1f}", f"{moe.seconds:.1f}"),
    ]


def _make_room(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    ours = {path.name for path in directory.iterdir()} <= {"dense", "moe", "moe.partial"}
    if not (overwrite and ours):
        raise UsageError(
            f"{directory} exists.",
            "" if ours else "It holds more than a quickstart's two models, so it is never removed.",
            "Give --overwrite to replace it, or another directory." if ours else "Give another directory.",
        )
    for path in directory.iterdir():
        shutil.rmtree(path)


def _side(path: Path, seconds: float) -> Side:
    checkpoint = Checkpoint.open(path)
    sizes = inspect(checkpoint)
    with quiet():
        model = load(checkpoint)
    batches = heldout_batches(
        DATA,
        lambda text: list(text.encode()),
        eos_id=model.config.eos_token_id,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        max_batches=HELDOUT_BATCHES,
    )
    loss = heldout_loss(model, batches)
    active = sizes.active_parameters or sizes.parameters
    return Side(str(path), sizes.parameters, active, sizes.bytes, seconds, loss)
