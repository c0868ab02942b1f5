"""The story in one command: a seed, a branch for each of three domains, Branch-Train-MiX, and what it was worth."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from moectl.checkpoint.provenance import verify_hashes
from moectl.checkpoint.source import Checkpoint, read_json
from moectl.checkpoint.writer import write
from moectl.compress.calibration import Calibration
from moectl.compress.qmoe_job import Job
from moectl.compress.qmoe_recipe import QmoeRecipe
from moectl.errors import CheckFailed, UsageError
from moectl.evaluation import run as evaluation
from moectl.evaluation.compare import compare
from moectl.routing import run as routing
from moectl.text import escape
from moectl.traces.domains import specialisation
from moectl.training.branch import branches
from moectl.training.byte_llama import BATCH_SIZE, DATA, DOMAINS, SEQUENCE_LENGTH, train_byte_llama
from moectl.training.metrics import Metrics
from moectl.training.recipe import TrainRecipe
from moectl.training.run import Outcome, Reporting, train
from moectl.training.world import World
from moectl.upcycle.average import plan_average
from moectl.upcycle.btx import plan_btx
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

TOLERANCE = 1e-5
SEQUENCES, LEARNING_RATE, WARMUP = BATCH_SIZE // 2, 1e-3, 10
"""Of the trainings after the seed's: as in `benchmarks/btx_story.sh`, of which this is a cell."""
HELDOUT_TOKENS, ROUTED_TOKENS = 16_384, 4_096
CALIBRATION_SEQUENCES = 64
COMPRESSED: dict[str, float | None] = {"btx-4-bits": 4, "btx-ternary": None}
"""Compressed mixtures, and the `--bits` of each."""
LAST = "btx-ternary"
"""What is made last: with it the story is told."""
PARTS = {"seed", "upcycled", "branches", "average", "btx-start", "btx", *COMPRESSED}
ASKED = "quickstart.json"
"""What a quickstart's directory holds: models, and what was asked for; anything else is never removed."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How long each model is trained: the seed in steps of 4,096 tokens, what follows in steps of 2,048."""

    seed: int = 150
    branch: int = 60
    moe: int = 150

    @property
    def total(self) -> int:
        """Of all trainings together."""
        return self.seed + self.after

    @property
    def after(self) -> int:
        """Of the trainings after the seed's."""
        return len(DOMAINS) * self.branch + self.moe


@dataclass(frozen=True, slots=True)
class Told:
    """What `moectl quickstart` reports.

    Attributes:
        path: of the finished MoE.
        max_logit_difference: between the seed and its sparse upcycling, which is the same function.
        loss: of each model and ensemble, the held-out loss of each domain and their mean, in nats per byte.
        served: for each expert the share of each domain's bytes that use it, averaged over the layers.
        bits: per expert weight of each compressed mixture, all that is stored of its experts counted.
        tokens: that all trainings saw.
        seconds: in all.
    """

    path: str
    max_logit_difference: float
    loss: dict[str, dict[str, float]]
    served: dict[str, dict[str, float]]
    bits: dict[str, float]
    tokens: int
    seconds: float


def quickstart(
    directory: Path,
    *,
    steps: Steps,
    seed: int,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _text: None,
    on_step: Callable[[Metrics], None] = lambda _metrics: None,
) -> Told:
    """Make every model of the story in `directory` and compare them; `say` hears of every stage.

    Raises:
        UsageError: `directory` exists and `overwrite` is not given, or it holds something else; a story that was
            interrupted is no hindrance, the same one goes on.
        CheckFailed: an upcycled model is not the same function.
    """
    started = perf_counter()
    _make_room(directory, {"steps": asdict(steps), "seed": seed}, overwrite)
    of_seed = directory / "seed"

    say(f"1. A seed: a byte-level Llama, {steps.seed} steps on code, prose and arithmetic that come with Python.")
    _go_on(train_byte_llama(of_seed, steps=steps.seed, seed=seed, on_step=on_step))

    say("2. Upcycled to 8 experts, top 2, it is the same function: hashes and logits are compared.")
    difference = _upcycled(of_seed, directory / "upcycled", seed)

    say(f"3. A branch of the seed for each domain, {steps.branch} steps each, apart from one another.")
    recipe = TrainRecipe(
        data=DATA,
        steps=steps.branch,
        batch_size=SEQUENCES,
        sequence_length=SEQUENCE_LENGTH,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        seed=seed,
    )
    experts = []
    for branch in branches(recipe, directory / "branches"):
        _train(of_seed, branch.recipe, branch.out, on_step)
        experts.append(branch.out)

    say("4. Branch-Train-MiX: the FFN of each branch is an expert, the rest is their average.")
    members = tuple(Expert(str(path), data=(spec,)) for path, spec in zip(experts, DATA, strict=True))
    mixture = BtxRecipe(members, top_k=2, router_init="text", seed=seed)
    models = open_models(mixture)
    write(plan_average(models, mixture), directory / "average")
    write(plan_btx(models, mixture, directory / "btx-start.statistics"), directory / "btx-start")

    say(f"5. The mixture learns to route: {steps.moe} steps on all three.")
    _train(directory / "btx-start", replace(recipe, steps=steps.moe), directory / "btx", on_step)

    say("6. Compressed, layer by layer: its experts in 4 bits a weight, and ternary in a code; the rest in 8.")
    bits = {name: _compressed(directory / "btx", directory / name, asked) for name, asked in COMPRESSED.items()}

    say("7. Held-out text for all of them, and whom the mixture's experts serve.")
    measured = (of_seed, *experts, directory / "average", directory / "btx", *(directory / name for name in COMPRESSED))
    found = evaluation.run(
        evaluation.Settings(
            models=tuple(map(str, measured)),
            data=DATA,
            ensemble=True,
            members=tuple(map(str, experts)),
            max_tokens=HELDOUT_TOKENS,
        )
    )
    loss = {
        name: {domain: of_domain.loss for domain, of_domain in result.items()}
        for name, result in zip(found.names, found.results, strict=True)
    }
    tokens = (steps.seed * BATCH_SIZE + steps.after * SEQUENCES) * SEQUENCE_LENGTH
    served = _served(directory / "btx")
    return Told(str(directory / "btx"), difference, loss, served, bits, tokens, perf_counter() - started)


def rows(told: Told) -> list[tuple[Any, ...]]:
    """The table: each model, its held-out loss of each domain and on average; which has the lowest; bits if few."""
    best = min(told.loss, key=lambda name: told.loss[name]["mean"])
    table: list[tuple[Any, ...]] = []
    for name, loss in told.loss.items():
        losses = (f"{loss[domain]:.3f}" for domain in (*DOMAINS, "mean"))
        remark = f"{told.bits[name]:.2f} bits per expert weight" if name in told.bits else ""
        table.append((name, *losses, "lowest mean" if name == best else remark))
    return table


def served_rows(told: Told) -> list[tuple[Any, ...]]:
    """The second table: each expert, the share of each domain's bytes that use it, and the domain it serves most."""
    return [
        (expert, *(f"{share[domain]:.0%}" for domain in DOMAINS), max(share, key=lambda domain: share[domain]))
        for expert, share in told.served.items()
    ]


def _upcycled(dense: Path, moe: Path, seed: int) -> float:
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(experts=8, top_k=2, seed=seed)), moe)
    opened = Checkpoint.open(moe)
    comparison = compare(opened, Checkpoint.open(dense), seed=seed)
    if not (verify_hashes(opened).ok and comparison.relative <= TOLERANCE):
        raise CheckFailed(f"{moe} is not the function of {dense}.", f"{comparison}", "Please report this: it is a bug.")
    return comparison.max_abs


def _compressed(moe: Path, out: Path, bits: float | None) -> float:
    calibration = Calibration(DATA, samples=CALIBRATION_SEQUENCES, sequence_length=SEQUENCE_LENGTH)
    job = Job.of(Checkpoint.open(moe), QmoeRecipe(bits=bits).checked(), calibration)
    place = out.with_name(f"{out.name}.statistics")
    plan, _ = job.plan(job.run(place, lambda _text: None, lambda _share: None))
    write(plan, out)
    shutil.rmtree(place)
    return float(plan.facts["bits_per_expert_parameter"])


def _train(source: Path, recipe: TrainRecipe, out: Path, on_step: Callable[[Metrics], None]) -> None:
    alone = World(0, 1, torch.device("cpu"))
    _go_on(train(Checkpoint.open(source), recipe, out, alone, reporting=Reporting(on_step=on_step)))


def _go_on(outcome: Outcome) -> None:
    """Let a signal that a training was stopped by do to the whole story what it does without one."""
    if outcome.signal is not None:
        signal.raise_signal(outcome.signal)


def _served(moe: Path) -> dict[str, dict[str, float]]:
    recorded = routing.record(Checkpoint.open(moe), DATA, routing.Settings(max_tokens=ROUTED_TOKENS, scores=False))
    layers = specialisation(recorded["decoder"].statistics)
    share_DE = np.mean([layer.share_DE for layer in layers], axis=0)
    return {
        f"expert {number} ({DOMAINS[number]}'s FFN)": dict(zip(DOMAINS, map(float, share_D), strict=True))
        for number, share_D in enumerate(share_DE.T)
    }


def _make_room(directory: Path, asked: dict[str, Any], overwrite: bool) -> None:
    """An empty directory, or one in which the same story was interrupted and goes on."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{escape(str(directory))} is no directory.", "", "Give another.")
    directory.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in directory.iterdir()}
    known = PARTS | {f"{name}.{end}" for name in PARTS for end in ("partial", "untrained", "statistics")} | {ASKED}
    note = directory / ASKED
    if found <= known and LAST not in found and ASKED in found and read_json(note) == asked:
        return
    if found and not (overwrite and found <= known):
        raise UsageError(
            f"{escape(str(directory))} exists.",
            "" if found <= known else "It holds more than a quickstart's models, so it is never removed.",
            "Give --overwrite to replace it, or another directory." if found <= known else "Give another directory.",
        )
    for name in found - {ASKED}:
        shutil.rmtree(directory / name)
    note.write_text(json.dumps(asked) + "\n", encoding="utf-8")
