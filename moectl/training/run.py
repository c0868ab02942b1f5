"""A training from beginning to end: resume, step after step, save, stop when told to, and publish.

OUT.partial holds everything until the end: `run.json` (what is being trained, so that another command is refused),
`checkpoints/`, `train/metrics.jsonl`. OUT appears by one rename, complete.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from moectl.checkpoint.journal import partial_of
from moectl.checkpoint.provenance import fingerprint_of
from moectl.checkpoint.publish import check_apart, exists_error, is_occupied
from moectl.data.mixture import Row, mixture_rows
from moectl.data.tokens import BEGINNING
from moectl.errors import CheckFailed, MoectlError
from moectl.integrations.transformers import NAME
from moectl.text import escape
from moectl.training import parameters
from moectl.training.adapters import Adapter, Source, attach, average_gradients, learning, saved, sources_of
from moectl.training.checkpoints import Checkpoints, whole_model
from moectl.training.checks import check
from moectl.training.export import publish
from moectl.training.hold import claimed, discard, stoppable
from moectl.training.metrics import Metrics, flops_per_token, load_cv, matmul_speed, max_vio
from moectl.training.model import load_encoding, load_spans
from moectl.training.optimizer import optimizer_of, schedule_of, set_rates
from moectl.training.pesc import PescWatch, pesc_blocks, pesc_top_k
from moectl.training.recipe import TrainRecipe
from moectl.training.routers import RouterWatch, moe_blocks, top_k_of
from moectl.training.routing import RoutedWatch, as_held, routed_blocks, routed_source
from moectl.training.sharded import load_placed
from moectl.training.step import Computed, Step
from moectl.training.trackers import Tracker, recording
from moectl.training.world import World

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
    source: Source,
    recipe: TrainRecipe,
    out: Path,
    world: World,
    *,
    save_every: int = 100,
    keep: int = 2,
    metrics: Path | None = None,
    log_to: Sequence[str] = (),
    overwrite: bool = False,
    expert_parallel: int = 1,
    reporting: Reporting | None = None,
) -> Outcome:
    """Train a checkpoint, or an adapter, and write the same to `out`; started again with the recipe, it goes on.

    In float32 with as many processes as before, the result of a run that was interrupted, however and how often, is
    bit for bit that of one that was not.

    Args:
        save_every: steps between two checkpoints; one is also taken on SIGTERM and SIGINT and after the last step.
        keep: how many checkpoints stay.
        expert_parallel: over how many processes the experts of a layer are spread; 1 shards them like the rest.
        metrics: where to write the steps; by default to `train/metrics.jsonl` in OUT.
        log_to: where to show them besides, of `TRACKERS`.

    Raises:
        CheckFailed: the loss or the gradient is not finite.
        InputError: the model or the data cannot be used.
        MachineError: another process was lost, or a tracker is not installed or cannot begin.
        UsageError: `out` overlaps a source, it or its partial output is another command's or in use, or an option is
            not meant for this model.
        SaidElsewhere: another process raises one of these.
    """
    reporting = reporting or Reporting()
    started = perf_counter()
    out = Path(os.path.normpath(out.absolute()))
    root = partial_of(out)
    with world.agreed():
        check(source, recipe, world.size, expert_parallel=expert_parallel, log_to=log_to)
        for one in sources_of(source):
            check_apart(out, one.path)
        fingerprint = recipe.fingerprint(*sources_of(source))
        complete = is_occupied(out) and not overwrite
        if complete and fingerprint_of(out) != fingerprint:
            raise exists_error(out)
    if complete:
        if world.is_main:
            discard(root, fingerprint)
        return Outcome(out, recipe.steps, 0.0, already=True)
    with claimed(root, fingerprint, recipe, world), stoppable() as stop:
        begun = routed_source(source, recipe, root, world)
        run = Run(begun, recipe, root, world, keep=keep, expert_parallel=expert_parallel)
        last = None
        with ExitStack() as records:
            told: list[Tracker] = []
            with world.agreed():
                if world.is_main:
                    file = metrics or root / METRICS
                    told = records.enter_context(recording(file, log_to, root, recipe.to_json(), fingerprint, run.step))
                    reporting.begun(run.facts)
            while run.step < recipe.steps:
                last = run.advance()
                for each in told:
                    each.add(last)
                if world.is_main:
                    reporting.on_step(last)
                stopped = world.any(stop.number is not None)
                if stopped or run.step % save_every == 0 or run.step == recipe.steps:
                    run.save()
                if stopped and run.step < recipe.steps:
                    return Outcome(out, run.step, perf_counter() - started, stop.number or signal.SIGTERM, last=last)
        tensors = saved(run.model) if isinstance(source, Adapter) else whole_model(run.model)
        with world.agreed():
            if world.is_main:
                like, tensors = as_held(source, begun, tensors)
                publish(tensors, source, recipe, fingerprint, root, out, like=like, overwrite=overwrite)
    return Outcome(out, recipe.steps, perf_counter() - started, last=last)


class Run:
    """A model, its optimiser and its data at a step."""

    def __init__(
        self,
        source: Source,
        recipe: TrainRecipe,
        root: Path,
        world: World,
        *,
        keep: int = 2,
        expert_parallel: int = 1,
    ) -> None:
        self.recipe, self.world = recipe, world
        self.adapter = source if isinstance(source, Adapter) else None
        base = sources_of(source)[0]
        # First: that there is no tokenizer or no such file should not take the time to load a model to say.
        with world.agreed():
            encoding = load_encoding(base, chat=recipe.has_chat)
            self.spans = load_spans(base)
        self.checkpoints = Checkpoints(root / "checkpoints", world, keep=keep, trained_only=self.adapter is not None)
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
        # On a CPU transformers' grouped_mm is the faster one to train with: benchmarks/results/train.json.
        implementation = recipe.implementation or (NAME if world.device.type == "cuda" else None)
        self.model: nn.Module = load_placed(base, world, implementation, expert_parallel)
        with world.agreed():
            if self.adapter:
                self.model = attach(self.adapter, self.model)
            pesc = pesc_blocks(self.model) if self.adapter else []
            routed = [] if pesc else routed_blocks(self.model)
            blocks = pesc or routed or moe_blocks(self.model)
            trained = parameters.select(
                self.model,
                blocks,
                only=recipe.only,
                freeze_experts=recipe.freeze_experts,
                adapters=learning(self.model) if self.adapter else None,
            )
        total = sum(parameter.numel() for parameter in self.model.parameters())
        top_k = pesc_top_k(self.model) if pesc else top_k_of(self.model)
        self.flops = flops_per_token(self.model, blocks, top_k, recipe.sequence_length)
        self.watch: PescWatch | RoutedWatch | RouterWatch | None = None
        if pesc:
            self.watch = PescWatch(self.model, pesc)
        elif blocks:
            self.watch = RoutedWatch(blocks) if routed else RouterWatch(blocks)
        self.optimizer = optimizer_of(self.model, blocks, recipe)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.schedule = schedule_of(self.optimizer, recipe)
        self.checkpoints.load(self.model, self.optimizer)
        set_rates(self.optimizer, self.schedule, self.step)
        self.compute = Step(self.model, self.watch, recipe, world)
        self.speed = matmul_speed(world.device, getattr(torch, recipe.dtype))
        self.facts = Facts(total, trained, len(blocks), self.step, self.flops, self.speed)

    def advance(self) -> Metrics:
        """The next step; the weights are as they were if it fails.

        Raises:
            CheckFailed: the loss or the gradient is not finite.
            InputError: the data cannot be read.
            SaidElsewhere: another process raises one of these.
        """
        started = perf_counter()
        recipe = self.recipe
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        with self.world.agreed():
            rows = list(islice(self.rows, recipe.batch_size))
        # What a model draws (dropout, jitter) follows from the step and the process, so no generator has to be saved.
        torch.manual_seed(_seed(recipe.seed, self.step, self.world.rank))
        if isinstance(self.watch, RoutedWatch):
            self.watch.at(self.step / recipe.steps)
        token_BL, learnt_BL = (
            np.stack(part) for part in zip(*((row.token_L, row.learnt_L) for row in rows), strict=True)
        )
        source_BS = None
        if self.spans:
            source_BS, token_BL = self.spans.pairs(token_BL, _seed(recipe.seed, self.step, -1))
            learnt_BL = np.ones_like(token_BL, dtype=bool)
        computed = self.compute.gradients(
            torch.from_numpy(token_BL),
            torch.from_numpy(learnt_BL),
            None if source_BS is None else torch.from_numpy(source_BS),
        )
        loss = computed.loss + computed.aux + computed.z
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss, rows)
        if self.adapter:
            average_gradients(self.trained, self.world)
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
        lr = next(rates[name] for name in ("model", "experts", "router") if name in rates)
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

    def _not_finite(self, what: str, value: float, rows: list[Row]) -> MoectlError:
        first = self.step * self.recipe.batch_size
        specs = sorted({self.recipe.parts[row.part].spec for row in rows})
        latest = self.checkpoints.latest()
        failed = CheckFailed(
            f"The {what} became {value} at step {self.step + 1} of {self.recipe.steps}, sequences {first} to "
            f"{first + len(rows) - 1} of the data ({escape(', '.join(specs))}).",
            f"Nothing was updated with it. The last good checkpoint is {escape(str(latest)) if latest else 'the model'}"
            ", and the same command would come to the same point.",
            "Lower --lr, warm up for longer, or look at those sequences; then train into another -o.",
        )
        return self.world.said_once(failed)


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")
