"""`moectl branch`: one training per domain of the same seed model, the first stage of Branch-Train-MiX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.cli import options, training, writing


def branch(
    seed_model: Annotated[str, typer.Argument(metavar="SEED", help="Directory, Hub id or hf://org/name@rev.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the branches, one in each DIR/DOMAIN.")],
    data: Annotated[list[str], typer.Option(metavar="SPEC", help="One domain: a file, directory, dataset; repeat it.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Train only this domain, as one of several machines; repeatable.", show_default=False),
    ] = None,
    steps: training.Steps = 1000,
    batch_size: training.BatchSize = 16,
    seq_len: training.SeqLen = 512,
    accumulate: training.Accumulate = 1,
    lr: training.Lr = 1e-4,
    schedule: training.Schedule = "cosine",
    warmup: training.Warmup = 0,
    min_lr: training.MinLr = 0.1,
    weight_decay: training.WeightDecay = 0.1,
    clip: training.Clip = 1.0,
    dtype: training.Compute = "float32",
    save_every: training.SaveEvery = 100,
    keep: training.Keep = 2,
    device: training.Device = "auto",
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
            outcome = training.train_shown(
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
                done.append({"domain": each.domain, **training.document(outcome, each.out)})
                output.note(f"{each.domain}: {training.ended(outcome, each.out)}", quiet=quiet)
                if not json:
                    output.emit_path(each.out)
            training.end_if_stopped(outcome)
    if json and world.is_main:
        output.emit_json("moectl.branch/1", {"path": str(out), "branches": done})
