"""`moectl train` and `moectl branch`: continued training of a checkpoint, on one CPU or many GPUs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options, writing

if TYPE_CHECKING:
    from moectl.checkpoint.source import Checkpoint
    from moectl.training.recipe import TrainRecipe
    from moectl.training.run import Facts, Outcome
    from moectl.training.world import World

Data = Annotated[
    list[str], typer.Option(metavar="SPEC[:WEIGHT]", help="A file, directory, Hub dataset or builtin:NAME; repeatable.")
]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per step, over all processes.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per packed sequence.")]
Accumulate = Annotated[int, typer.Option(help="Micro-batches each step is computed in.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Schedule = Annotated[str, typer.Option(help="cosine, linear or constant, after the warm-up.")]
Warmup = Annotated[int, typer.Option(help="Steps until the peak.")]
MinLr = Annotated[float, typer.Option(help="Where the cosine ends, as a share of the peak.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's decay of matrices.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient.")]
Compute = Annotated[str, typer.Option(help="float32, or bfloat16 for autocast; weights are trained in float32.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints that are kept while training.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.", show_default=False)]


def train(
    model: options.Model,
    out: writing.Out,
    data: Data,
    steps: Steps = 1000,
    batch_size: BatchSize = 16,
    seq_len: SeqLen = 512,
    accumulate: Accumulate = 1,
    lr: Lr = 1e-4,
    router_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the routers; --lr when left out.", show_default=False)
    ] = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    min_lr: MinLr = 0.1,
    weight_decay: WeightDecay = 0.1,
    clip: Clip = 1.0,
    only: Annotated[str, typer.Option(help="What is trained: all, router, experts or attention+router.")] = "all",
    freeze_experts: Annotated[bool, typer.Option("--freeze-experts", help="Leave the routed experts alone.")] = False,
    aux_loss: Annotated[float, typer.Option(help="Coefficient of each layer's balancing loss; 0 is off.")] = 0.01,
    z_loss: Annotated[float, typer.Option(help="Coefficient of each layer's router z-loss; 0 is off.")] = 0.0,
    bias_update: Annotated[
        float, typer.Option(help="Step of the selection biases, in families that have them; 0 is off.")
    ] = 0.0,
    dtype: Compute = "float32",
    experts_implementation: Annotated[
        str | None,
        typer.Option(help="transformers' name of one, or moectl, the default on a GPU.", show_default=False),
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(help="Processes the experts of a layer are spread over; tokens are sent to them.")
    ] = 1,
    save_every: SaveEvery = 100,
    keep: Keep = 2,
    metrics: Annotated[
        Path | None,
        typer.Option(help="Where to write the steps; OUT/train/metrics.jsonl when left out.", show_default=False),
    ] = None,
    device: Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    overwrite: writing.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a checkpoint further, dense or Mixture-of-Experts, and write an ordinary checkpoint.

    One process needs no launcher; under torchrun the model is sharded over all of them (FSDP2) and the data stays the
    same. stdout is the path of OUT.

    SIGTERM saves and exits with 143. The same command resumes from the last checkpoint, whatever ended it, and gives
    the parameters of an undisturbed run, bit for bit in float32 with as many processes as before.
    """
    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output
    from moectl.training.recipe import TrainRecipe
    from moectl.training.world import joined

    recipe = TrainRecipe(
        data=tuple(data),
        steps=steps,
        batch_size=batch_size,
        sequence_length=seq_len,
        accumulate=accumulate,
        learning_rate=lr,
        router_rate=router_lr,
        schedule=schedule,
        warmup=warmup,
        min_rate=min_lr,
        weight_decay=weight_decay,
        clip=clip,
        only=only,
        freeze_experts=freeze_experts,
        aux_loss=aux_loss,
        z_loss=z_loss,
        bias_update=bias_update,
        dtype=dtype,
        implementation=experts_implementation,
        seed=seed,
    )
    recipe.check()
    source = Checkpoint.open(model, revision)
    with joined(device) as world:
        outcome = _train(
            source,
            recipe,
            out,
            world,
            save_every=save_every,
            keep=keep,
            metrics=metrics,
            overwrite=overwrite,
            expert_parallel=expert_parallel,
            quiet=quiet,
            title="training",
        )
    if world.is_main and outcome.signal is None:
        if json:
            output.emit_json("moectl.train/1", _document(outcome, out))
        else:
            output.emit_path(out)
        output.note(_ended(outcome, out), quiet=quiet)
    _end_if_stopped(outcome)


def branch(
    seed_model: Annotated[str, typer.Argument(metavar="SEED", help="Directory, Hub id or hf://org/name@rev.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the branches, one in each DIR/DOMAIN.")],
    data: Annotated[list[str], typer.Option(metavar="SPEC", help="One domain: a file, directory, dataset; repeat it.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Train only this domain, as one of several machines; repeatable.", show_default=False),
    ] = None,
    steps: Steps = 1000,
    batch_size: BatchSize = 16,
    seq_len: SeqLen = 512,
    accumulate: Accumulate = 1,
    lr: Lr = 1e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    min_lr: MinLr = 0.1,
    weight_decay: WeightDecay = 0.1,
    clip: Clip = 1.0,
    dtype: Compute = "float32",
    save_every: SaveEvery = 100,
    keep: Keep = 2,
    device: Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    overwrite: writing.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train one copy of a seed model per domain: the branches that moectl upcycle btx makes into experts.

    Each is an independent moectl train with that one --data (Branch-Train-MiX, arXiv 2403.07816): here one after the
    other, or with --domain anywhere and at once. stdout is the path of each; the same command resumes.
    """
    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output
    from moectl.training.branch import branches
    from moectl.training.recipe import TrainRecipe
    from moectl.training.world import joined

    recipe = TrainRecipe(
        data=tuple(data),
        steps=steps,
        batch_size=batch_size,
        sequence_length=seq_len,
        accumulate=accumulate,
        learning_rate=lr,
        schedule=schedule,
        warmup=warmup,
        min_rate=min_lr,
        weight_decay=weight_decay,
        clip=clip,
        dtype=dtype,
        seed=seed,
    )
    recipe.check()
    wanted = branches(recipe, out, domain or ())
    source = Checkpoint.open(seed_model, revision)
    done: list[dict[str, Any]] = []
    with joined(device) as world:
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
        world.barrier()
        for each in wanted:
            outcome = _train(
                source,
                each.recipe,
                each.out,
                world,
                save_every=save_every,
                keep=keep,
                metrics=None,
                overwrite=overwrite,
                quiet=quiet,
                title=each.domain,
            )
            if outcome.signal is None and world.is_main:
                done.append({"domain": each.domain, **_document(outcome, each.out)})
                output.note(f"{each.domain}: {_ended(outcome, each.out)}", quiet=quiet)
                if not json:
                    output.emit_path(each.out)
            _end_if_stopped(outcome)
    if json and world.is_main:
        output.emit_json("moectl.branch/1", {"path": str(out), "branches": done})


def _train(
    source: Checkpoint, recipe: TrainRecipe, out: Path, world: World, *, quiet: bool, title: str, **how: Any
) -> Outcome:
    """Train with the line on the terminal, which begins when the facts are known."""
    from contextlib import ExitStack

    from moectl.report import output
    from moectl.training.live import live
    from moectl.training.run import Reporting, train

    shown: list[Any] = []
    with ExitStack() as stack:

        def begun(facts: Facts) -> None:
            output.note(_begun(facts, recipe, world.size), quiet=quiet)
            shown.append(stack.enter_context(live(title, recipe.steps, facts.resumed_from, quiet=quiet)))

        reporting = Reporting(begun, lambda metrics: shown[0](metrics))
        return train(source, recipe, out, world, reporting=reporting, **how)


def _begun(facts: Facts, recipe: TrainRecipe, processes: int) -> str:
    from moectl.report import output

    layers = f", {facts.moe_layers} MoE layers" if facts.moe_layers else ""
    resumed = f", resumed after step {facts.resumed_from}" if facts.resumed_from else ""
    return (
        f"{output.count(facts.trained)} of {output.count(facts.parameters)} parameters{layers}, "
        f"{recipe.steps} steps of {recipe.batch_size} x {recipe.sequence_length} tokens on {processes} process(es)"
        f"{resumed}"
    )


def _document(outcome: Outcome, out: Path) -> dict[str, Any]:
    from dataclasses import asdict

    last = asdict(outcome.last) if outcome.last else None
    return {
        "path": str(out),
        "step": outcome.step,
        "already_complete": outcome.already,
        "seconds": outcome.seconds,
        "last": last,
    }


def _ended(outcome: Outcome, out: Path) -> str:
    import shlex

    last = outcome.last
    how = f"loss {last.loss:.4f} at step {last.step}, " if last else ""
    state = "was already complete" if outcome.already else f"{how}{outcome.seconds:.1f} s"
    return f"{state}.\nNext: moectl inspect {shlex.quote(str(out))}"


def _end_if_stopped(outcome: Outcome) -> None:
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.signal is not None:
        raise SystemExit(128 + outcome.signal)
