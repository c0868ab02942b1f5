"""Run by torchrun in two processes: a sharded step against a whole one, and a run that is stopped and resumed.

    torchrun --standalone --nproc-per-node 2 two_processes.py DIRECTORY

The first process writes what was found to DIRECTORY/found.json. DIRECTORY holds moe/, ds/ and data/.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_training as models
import torch
from tiny_training import ONE
from torch.distributed.tensor import DTensor

from moectl.checkpoint.source import Checkpoint
from moectl.training.checkpoints import whole_model
from moectl.training.run import Reporting, Run, train
from moectl.training.world import World, joined


def one_step(source: Checkpoint, recipe: Any, world: World, root: Path, ep: int = 1) -> tuple[Any, ...]:
    """Weights after one step, what it measured, and how many experts of a layer are here, by which mesh."""
    run = Run(source, recipe, root, world, expert_parallel=ep)
    metrics = run.advance()
    weight = next(p for name, p in run.model.named_parameters() if name.endswith("experts.down_proj"))
    held = [len(weight.to_local()), *weight.device_mesh.mesh_dim_names] if isinstance(weight, DTensor) else []
    return whole_model(run.model), metrics, held


def main(directory: Path, world: World) -> dict[str, Any]:
    """Everything that two processes are needed for, in one launch."""
    found: dict[str, Any] = {}
    data = tuple(str(path) for path in sorted((directory / "data").iterdir()))
    root = directory / "none"
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
