"""Run by torchrun in two processes: a sharded step against a whole one, and a run that is stopped and resumed.

    torchrun --standalone --nproc-per-node 2 two_processes.py DIRECTORY

The first process writes what was found to DIRECTORY/found.json. DIRECTORY holds moe/, ds/, pesc/, load/, data/
and what is refused: quantised/, broken/ and found-before.json.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_training as models
import torch
from tiny_training import ONE
from torch.distributed.tensor import DTensor

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MoectlError
from moectl.routers.minimax_01 import MiniMax01, MiniMax01Options
from moectl.routers.protocol import Context
from moectl.training.adapters import Source, open_source, saved
from moectl.training.checkpoints import whole_model
from moectl.training.model import load_model
from moectl.training.run import Reporting, Run, train
from moectl.training.sharded import load_sharded
from moectl.training.world import World, joined


def one_step(source: Checkpoint, recipe: Any, world: World, root: Path, ep: int = 1) -> tuple[Any, ...]:
    """Weights after one step, what it measured, and how many experts of a layer are here, by which mesh."""
    run = Run(source, recipe, root, world, expert_parallel=ep)
    metrics = run.advance()
    weight = next(p for name, p in run.model.named_parameters() if name.endswith("experts.down_proj"))
    held = [len(weight.to_local()), *weight.device_mesh.mesh_dim_names] if isinstance(weight, DTensor) else []
    return whole_model(run.model), metrics, held


def loaded_alike(source: Checkpoint, world: World) -> bool:
    """Whether a model loaded in pieces is, to the bit, the one loaded whole: weights, buffers, logits."""
    pieces, whole = load_sharded(source, world).eval(), load_model(source).eval()
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        same = torch.equal(pieces(ids).logits, whole(ids).logits)
    buffers = dict(whole.named_buffers())
    same &= buffers.keys() == dict(pieces.named_buffers()).keys()
    same &= all(torch.equal(buffer, buffers[name]) for name, buffer in pieces.named_buffers())
    gathered, expected = whole_model(pieces), whole.state_dict()
    same &= all(torch.equal(tensor, expected[name]) for name, tensor in gathered.items())
    own = sum(len(p.to_local()) if isinstance(p, DTensor) else 0 for p in pieces.parameters())
    same &= own < 0.6 * sum(map(len, whole.parameters())) and bool(gathered) == world.is_main
    return not world.any(not same)


def adapter_step(source: Source, recipe: Any, world: World, root: Path) -> dict[str, Any]:
    """One step of an adapter on a base model in pieces against one on a whole one; then stopped and resumed."""
    run = Run(source, recipe, root, world)
    step, ours = run.advance(), saved(run.model)
    alone = Run(source, recipe, root, ONE)
    expected, theirs = alone.advance(), saved(alone.model)
    base = [p for name, p in run.model.named_parameters() if not p.requires_grad]
    outs = [root.with_name(name) for name in ("pesc-undisturbed", "pesc-resumed")]
    train(source, recipe, outs[0], world)

    def stop(_metrics: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    train(source, recipe, outs[1], world, reporting=Reporting(on_step=stop))
    train(source, recipe, outs[1], world)
    return {
        "base_in_pieces": all(isinstance(parameter, DTensor) for parameter in base),
        "numbers": [[each.loss, each.aux, each.grad_norm] for each in (step, expected)],
        "loads_equal": step.load_cv == expected.load_cv,
        "difference": max(relative(tensor, theirs[name]) for name, tensor in ours.items()),
    }


def shared_room(world: World) -> dict[str, Any]:
    """Which assignments find no room where each process has half of the tokens, and where one has all of them."""
    score_TE = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 5)
    router = MiniMax01(None, 5, MiniMax01Options(top_k=3, capacity_factor=0.8))
    own_T = slice(30 * world.rank, 30 * world.rank + 30)
    dropped_TK = torch.zeros(60, 3, dtype=torch.int64)
    dropped_TK[own_T] = router.route(score_TE[own_T], Context(training=True)).dropped_TK.long()
    whole_TK = router.route(score_TE, Context()).dropped_TK.long()  # in use a process asks no other
    return {"apart": world.sum(dropped_TK).tolist(), "whole": whole_TK.tolist()}


def refusals(directory: Path, data: tuple[str, ...], world: World) -> dict[str, list[Any]]:
    """How each process ends where something is wrong: for both, for the first alone, or for the second alone."""
    recipe = models.recipe(data)
    moe, quantised, broken, dense = (
        Checkpoint.open(directory / name) for name in ("moe", "quantised", "broken", "load/llama")
    )
    full = OSError(errno.ENOSPC, "No space left on device")
    torn = Run(moe, recipe, directory / "none", world)
    if not world.is_main:
        torn.rows = iter(lambda: _raise(InputError("The data is gone.", "", "")), None)

    def unpublished() -> None:
        with patch("moectl.training.run.publish", side_effect=full):
            train(moe, recipe, directory / "refused", world)

    ways: dict[str, Callable[[], object]] = {
        "the model is quantised": lambda: Run(quantised, recipe, directory / "none", world),
        "there is nothing to train": lambda: Run(dense, replace(recipe, only="router"), directory / "none", world),
        "the loss is not finite": lambda: train(broken, recipe, directory / "refused", world),
        "the file of steps is another's": lambda: train(
            moe, recipe, directory / "refused", world, metrics=directory / "found-before.json"
        ),
        "the disk is full": unpublished,
        "a process cannot read the data": torn.advance,
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
        except (MoectlError, OSError) as error:
            ended: list[Any] = [None] * world.size
            said = type(error).__name__, getattr(error, "exit_code", None)
            torch.distributed.all_gather_object(ended, said)
            found[name] = ended
    return found


def _raise(error: Exception) -> None:
    raise error


def main(directory: Path, world: World) -> dict[str, Any]:
    """Everything that two processes are needed for, in one launch."""
    found: dict[str, Any] = {}
    data = tuple(str(path) for path in sorted((directory / "data").iterdir()))
    root = directory / "none"
    models_to_load = sorted((directory / "load").iterdir())
    found["loaded_alike"] = {path.name: loaded_alike(Checkpoint.open(path), world) for path in models_to_load}
    for name, model, ep, options in (
        ("fsdp", "moe", 1, {}),
        ("fsdp with biases", "ds", 1, {"bias_update": 0.01, "aux_loss": 0.02}),
        ("fsdp and experts", "moe", 2, {}),
    ):
        source = Checkpoint.open(directory / model)
        recipe = models.recipe(data, warmup=0, learning_rate=3e-4, **options)
        sharded, metrics, held = one_step(source, recipe, world, root, ep)
        if world.is_main:
            whole, expected, _ = one_step(source, recipe, ONE, root)
            before = Run(source, recipe, root, ONE).model.state_dict()
            found[name] = {
                "held": held,
                "loss": [metrics.loss, expected.loss],
                "aux": [metrics.aux, expected.aux],
                "grad_norm": [metrics.grad_norm, expected.grad_norm],
                "loads_equal": metrics.load_cv == expected.load_cv,
                "difference": max(relative(sharded[key], whole[key]) for key in whole),
                "moved": max(relative(whole[key], before[key]) for key in whole),
            }
        world.barrier()

    adapters = models.recipe(data, warmup=0, steps=3, learning_rate=3e-4, only="adapters")
    found["pesc"] = adapter_step(open_source(str(directory / "pesc")), adapters, world, root)
    source, recipe = Checkpoint.open(directory / "moe"), models.recipe(data, learning_rate=3e-4)

    def stop(metrics: Any) -> None:
        if metrics.step == 3:  # in the first process alone: the other one hears of it
            os.kill(os.getpid(), signal.SIGTERM)

    train(source, recipe, directory / "undisturbed", world)
    for name in ("resumed", "left"):
        outcome = train(source, recipe, directory / name, world, reporting=Reporting(on_step=stop))
        found[f"stopped_{name}"] = [outcome.step, outcome.signal]
    train(source, recipe, directory / "resumed", world)
    train(source, recipe, directory / "spread", world, reporting=Reporting(on_step=stop), expert_parallel=2)
    train(source, recipe, directory / "spread", world, expert_parallel=2)
    found["room"] = shared_room(world)
    for router in models.COUNTING:
        train(source, models.routed_recipe(data, router), directory / models.named(router), world)
    found["refused"] = refusals(directory, data, world)
    return found


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far one tensor is from another, relative to its norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as everyone:
        result = main(Path(sys.argv[1]), everyone)
        if everyone.is_main:
            (Path(sys.argv[1]) / "found.json").write_text(json.dumps(result))
