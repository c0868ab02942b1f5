"""What a training would do and take, without loading a weight or writing a byte: `moectl train --dry-run`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moectl.checkpoint.fs import free_bytes
from moectl.checkpoint.journal import partial_of
from moectl.checkpoint.provenance import fingerprint_of
from moectl.checkpoint.publish import check_apart, exists_error, is_occupied
from moectl.data.documents import read_documents
from moectl.integrations.routed.install import install
from moectl.layerwise.routed import router_of
from moectl.layerwise.skeleton import build, read_config
from moectl.training import parameters
from moectl.training.adapters import Adapter, Source, attach, learning, sources_of
from moectl.training.checkpoints import Checkpoints
from moectl.training.hold import is_own
from moectl.training.model import check_trainable, load_encoding, load_spans
from moectl.training.pesc import pesc_blocks
from moectl.training.recipe import TrainRecipe
from moectl.training.routers import moe_blocks
from moectl.training.routing import routed_blocks
from moectl.training.world import World

FLOAT = 4
"""Bytes of a weight and of a gradient: both are float32; AdamW keeps two more numbers of that type."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A training in numbers.

    Attributes:
        data: each domain and its share of the sequences.
        output_bytes: of the weights in OUT.
        weight_bytes, gradient_bytes, optimizer_bytes: in the memory of one process, activations aside.
        checkpoint_bytes: of one checkpoint; `keep` of them stay, and one more is there while it is written.
        disk_bytes: the most that is written at once.
        resumed_from: the step of the checkpoint that the run would go on from; 0 at the beginning.
        complete: whether OUT is this training's already, so that nothing would be done.
    """

    parameters: int
    trained: int
    moe_layers: int
    steps: int
    tokens: int
    tokens_per_step: int
    data: tuple[tuple[str, float], ...]
    output_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    free_bytes: int
    resumed_from: int
    complete: bool
    fingerprint: str


def preview(
    source: Source, recipe: TrainRecipe, out: Path, world: World, *, keep: int = 2, overwrite: bool = False
) -> Preview:
    """What `train` would do with these; no weights are read. `checks.check` comes first.

    Raises:
        InputError: the model or the data cannot be used.
        UsageError: `out` overlaps a source, or it or its partial output is another command's.
    """
    out = Path(os.path.normpath(out.absolute()))
    for one in sources_of(source):
        check_apart(out, one.path)
    root, fingerprint = partial_of(out), recipe.fingerprint(*sources_of(source))
    complete = is_occupied(out) and not overwrite
    if complete and fingerprint_of(out) != fingerprint:
        raise exists_error(out)
    if not complete:
        is_own(root, fingerprint)
    resumed_from = recipe.steps if complete else Checkpoints(root / "checkpoints", world, keep=keep).where()[0]

    base, adapter = sources_of(source)[0], source if isinstance(source, Adapter) else None
    check_trainable(base)
    load_encoding(base, chat=recipe.has_chat)
    load_spans(base)
    model: nn.Module = build(base, torch.float32, "cpu", two_stacks=True)
    output = sources_of(source)[-1].nbytes
    if recipe.router is not None:
        before = _nbytes(model)
        with torch.device("meta"):
            install(model, router_of(recipe.router, read_config(base)))
        output += _nbytes(model) - before
    if adapter:
        model = attach(adapter, model)
    whole = learning(model) if adapter else {}
    blocks = (pesc_blocks(model) if adapter else []) or routed_blocks(model) or moe_blocks(model)
    trained = parameters.select(
        model,
        blocks,
        only=recipe.only,
        freeze_experts=recipe.freeze_experts,
        adapters=whole if adapter else None,
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    # FSDP spreads the model over the processes; an adapter every one of them holds whole.
    held = sum(parameter.numel() for parameter in whole.values())
    own = held + math.ceil((total - held) / world.size)
    own_trained = trained if adapter else math.ceil(trained / world.size)
    checkpoint = FLOAT * ((trained if adapter else total) + 2 * trained)
    per_step = recipe.batch_size * recipe.sequence_length
    weights = math.fsum(part.weight for part in recipe.parts)
    return Preview(
        parameters=total,
        trained=trained,
        moe_layers=len(blocks),
        steps=recipe.steps,
        tokens=recipe.steps * per_step,
        tokens_per_step=per_step,
        data=tuple((read_documents([part.spec]).sources[0].domain, part.weight / weights) for part in recipe.parts),
        output_bytes=output,
        weight_bytes=FLOAT * own,
        gradient_bytes=FLOAT * own_trained,
        optimizer_bytes=2 * FLOAT * own_trained,
        checkpoint_bytes=checkpoint,
        disk_bytes=output + (keep + 1) * checkpoint,
        free_bytes=free_bytes(out),
        resumed_from=resumed_from,
        complete=complete,
        fingerprint=fingerprint,
    )


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
