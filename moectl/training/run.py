"""A training from beginning to end: resume, step after step, save, stop when told to, and publish.

OUT.partial holds everything until the end: `run.json` (what is being trained, so that another command is refused),
`checkpoints/`, `train/metrics.jsonl`. OUT appears by one rename, complete.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from moectl.checkpoint.journal import partial_of
from moectl.checkpoint.provenance import fingerprint_of
from moectl.checkpoint.publish import exists_error, is_occupied
from moectl.checkpoint.source import Checkpoint
from moectl.data.chat import is_chat
from moectl.data.mixture import Row, mixture_rows
from moectl.data.tokens import BEGINNING
from moectl.errors import CheckFailed
from moectl.integrations.transformers import NAME
from moectl.text import escape
from moectl.training import parameters
from moectl.training.checkpoints import Checkpoints, whole_model
from moectl.training.expert_parallel import distributed_config
from moectl.training.export import publish
from moectl.training.hold import claimed, discard, stoppable
from moectl.training.metrics import Metrics, MetricsFile, flops_per_token, load_cv, matmul_speed, max_vio
from moectl.training.model import load_encoding, load_model
from moectl.training.recipe import SCHEDULES, TrainRecipe
from moectl.training.routers import RouterWatch, moe_blocks
from moectl.training.sharded import load_sharded
from moectl.training.step import Computed, Step
from moectl.training.world import World

BETAS = (0.9, 0.95)
METRICS = Path("train") / "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run says about itself before its first step."""

    parameters: int
    trained: int
    moe_layers: int
    resumed_from: int
    flops_per_token: int
    matmul_flops_per_second: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `signal` is what stopped it before the last step, None at the end; `already` if it was done."""

    path: Path
    step: int
    seconds: float
    signal: int | None = None
    already: bool = False
    last: Metrics | None = None


@dataclass(frozen=True)
class Reporting:
    """Who is told: `begun` hears the facts, `on_step` every step. Only the first process tells."""

    begun: Callable[[Facts], None] = lambda _facts: None
    on_step: Callable[[Metrics], None] = lambda _metrics: None


def train(
    source: Checkpoint,
    recipe: TrainRecipe,
    out: Path,
    world: World,
    *,
    save_every: int = 100,
    keep: int = 2,
    metrics: Path | None = None,
    overwrite: bool = False,
    expert_parallel: int = 1,
    reporting: Reporting | None = None,
) -> Outcome:
    """Train a checkpoint and write the result to `out`; started again with the same recipe, it goes on.

    In float32 with as many processes as before, the result of a run that was interrupted, however and how often, is
    bit for bit that of one that was not.

    Args:
        save_every: steps between two checkpoints; one is also taken on SIGTERM and SIGINT and after the last step.
        keep: how many checkpoints stay.
        expert_parallel: over how many processes the experts of a layer are spread; 1 shards them like the rest.
        metrics: where to write the steps; by default to `train/metrics.jsonl` in OUT.

    Raises:
        CheckFailed: the loss or the gradient is not finite.
        InputError: the model or the data cannot be used.
        MachineError: another process was lost.
        UsageError: `out` or its partial output is another command's, or in use.
    """
    recipe.check()
    recipe.check_processes(world.size)
    reporting = reporting or Reporting()
    started = perf_counter()
    out = Path(os.path.normpath(out.absolute()))
    root = partial_of(out)
    fingerprint = recipe.fingerprint(source)
    if is_occupied(out) and not overwrite:
        if fingerprint_of(out) != fingerprint:
            raise exists_error(out)
        if world.is_main:
            discard(root, fingerprint)
        return Outcome(out, recipe.steps, 0.0, already=True)
    with claimed(root, fingerprint, recipe, world), stoppable() as stop:
        run = Run(source, recipe, root, world, keep=keep, expert_parallel=expert_parallel)
        file = MetricsFile(metrics or root / METRICS, run.step) if world.is_main else None
        if world.is_main:
            reporting.begun(run.facts)
        last = None
        while run.step < recipe.steps:
            last = run.advance()
            if file:
                file.add(last)
                reporting.on_step(last)
            stopped = world.any(stop.number is not None)
            if stopped or run.step % save_every == 0 or run.step == recipe.steps:
                run.save()
            if stopped and run.step < recipe.steps:
                return Outcome(out, run.step, perf_counter() - started, stop.number or signal.SIGTERM, last=last)
        if file:
            file.close()
        tensors = whole_model(run.model)
        if world.is_main:
            publish(tensors, source, recipe, fingerprint, root, out, overwrite=overwrite)
        world.barrier()
    return Outcome(out, recipe.steps, perf_counter() - started, last=last)


class Run:
    """A model, its optimiser and its data at a step."""

    def __init__(
        self,
        source: Checkpoint,
        recipe: TrainRecipe,
        root: Path,
        world: World,
        *,
        keep: int = 2,
        expert_parallel: int = 1,
    ) -> None:
        self.recipe, self.world = recipe, world
        # First: that there is no tokenizer or no such file should not take the time to load a model to say.
        chat = any(is_chat(part.spec) for part in recipe.parts)
        encoding = load_encoding(source, int(source.config.get("vocab_size") or 1 << 62), chat=chat)
        self.checkpoints = Checkpoints(root / "checkpoints", world, keep=keep)
        self.step, places = self.checkpoints.where()
        self.places = places or [BEGINNING] * len(recipe.parts)
        self.rows = mixture_rows(
            recipe.parts,
            encoding.encode,
            eos_id=encoding.eos_id,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            encode_chat=encoding.encode_chat,
            skip=self.step * recipe.batch_size,
            starts=self.places,
        )
        distributed = distributed_config(world, expert_parallel) if expert_parallel > 1 else None
        # On a CPU transformers' grouped_mm is the faster one to train with: benchmarks/results/train.json.
        implementation = recipe.implementation or (NAME if world.device.type == "cuda" else None)
        self.model: nn.Module = (
            load_model(source, implementation, distributed=distributed).to(world.device)
            if world.size == 1 or distributed
            else load_sharded(source, world, implementation)
        )
        blocks = moe_blocks(self.model)
        trained = parameters.select(self.model, blocks, only=recipe.only, freeze_experts=recipe.freeze_experts)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        top_k = _top_k(self.model.config.get_text_config(decoder=True))
        self.flops = flops_per_token(self.model, blocks, top_k, recipe.sequence_length)
        self.watch = RouterWatch(blocks) if blocks else None
        self.optimizer = torch.optim.AdamW(
            parameters.groups(
                self.model,
                blocks,
                learning_rate=recipe.learning_rate,
                router_rate=recipe.learning_rate if recipe.router_rate is None else recipe.router_rate,
                weight_decay=recipe.weight_decay,
            ),
            lr=recipe.learning_rate,
            betas=BETAS,
            fused=True,
        )
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        bounds = {"min_lr_rate": recipe.min_rate} if recipe.schedule == "cosine" else {}
        self.schedule = get_scheduler(
            SCHEDULES[recipe.schedule],
            self.optimizer,
            num_warmup_steps=recipe.warmup,
            num_training_steps=recipe.steps,
            scheduler_specific_kwargs=bounds,
        )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.checkpoints.load(self.model, self.optimizer)
        self._set_rates(rates)
        self.compute = Step(self.model, self.watch, recipe, world)
        self.speed = matmul_speed(world.device, getattr(torch, recipe.dtype))
        self.facts = Facts(total, trained, len(blocks), self.step, self.flops, self.speed)

    def advance(self) -> Metrics:
        """The next step; the weights are as they were if it fails.

        Raises:
            CheckFailed: the loss or the gradient is not finite.
        """
        started = perf_counter()
        recipe = self.recipe
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        rows = list(islice(self.rows, recipe.batch_size))
        # What a model draws (dropout, jitter) follows from the step and the process, so no generator has to be saved.
        torch.manual_seed(_seed(recipe.seed, self.step, self.world.rank))
        token_BL, learnt_BL = (
            np.stack(part) for part in zip(*((row.token_L, row.learnt_L) for row in rows), strict=True)
        )
        computed = self.compute.gradients(torch.from_numpy(token_BL), torch.from_numpy(learnt_BL))
        if not math.isfinite(computed.loss + computed.aux + computed.z):
            raise self._not_finite("loss", computed.loss, rows)
        norm = self.compute.update(computed, self.trained, self.optimizer, self.schedule)
        if not math.isfinite(norm):
            raise self._not_finite("norm of the gradient", norm, rows)
        self.step += 1
        for row in rows:
            self.places[row.part] = row.end
        return self._metrics(computed, norm, rates, perf_counter() - started)

    def save(self) -> None:
        """Take a checkpoint, by all processes."""
        self.checkpoints.save(self.step, self.places, self.model, self.optimizer)

    def _metrics(self, computed: Computed, norm: float, rates: dict[str, float], seconds: float) -> Metrics:
        tokens = self.recipe.batch_size * self.recipe.sequence_length
        loads = (
            [load_E[: block.num_experts] for block, load_E in zip(self.watch.blocks, computed.load, strict=True)]
            if self.watch and computed.load is not None
            else []
        )
        speed = tokens / seconds
        lr = rates.get("model", rates.get("router", 0.0))
        return Metrics(
            step=self.step,
            loss=computed.loss,
            aux=computed.aux / len(loads) if loads else None,
            z=computed.z / len(loads) if loads else None,
            grad_norm=norm,
            lr=lr,
            router_lr=rates.get("router", lr),
            tokens=self.step * tokens,
            seconds=seconds,
            tokens_per_second=speed,
            mfu=speed * self.flops / (self.speed * self.world.size),
            load_cv=tuple(load_cv(load_E) for load_E in loads),
            max_vio=tuple(max_vio(load_E) for load_E in loads),
        )

    def _set_rates(self, rates: list[float]) -> None:
        """Put the schedule where it is after `step` steps: every rate is its peak times a function of the step."""
        if self.step == 0:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            return
        self.schedule.last_epoch = self.step
        for group, peak, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(self.step)

    def _not_finite(self, what: str, value: float, rows: list[Row]) -> CheckFailed:
        first = self.step * self.recipe.batch_size
        specs = sorted({self.recipe.parts[row.part].spec for row in rows})
        latest = self.checkpoints.latest()
        return CheckFailed(
            f"The {what} became {value} at step {self.step + 1} of {self.recipe.steps}, sequences {first} to "
            f"{first + len(rows) - 1} of the data ({escape(', '.join(specs))}).",
            f"Nothing was updated with it. The last good checkpoint is {escape(str(latest)) if latest else 'the model'}"
            ", and the same command would come to the same point.",
            "Lower --lr, warm up for longer, or look at those sequences; then train into another -o.",
        )


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")


def _top_k(config: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "top_k"):
        value = getattr(config, name, None)
        if value:
            return int(max(value) if isinstance(value, list) else value)
    return 1
