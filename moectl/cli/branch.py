"""`moectl branch`: one training per domain of the same seed model, the first stage of Branch-Train-MiX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.cli import checks, options, training, writing
from moectl.cli.groups import grouped
from moectl.errors import UsageError
from moectl.text import escape


@grouped
def branch(
    seed_model: Annotated[str, typer.Argument(metavar="SEED", help="Directory, Hub id or hf://org/name@rev.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Directory of the branches, one in each DIR/DOMAIN.", callback=checks.place),
    ],
    data: Annotated[list[str], typer.Option(metavar="SPEC", help="One domain: a file, directory, dataset; repeat it.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Train only this domain, as one of several machines; repeatable.", show_default=False),
    ] = None,
    *,
    steps: training.Steps,
    schedule: training.Schedule,
    dtype: training.Compute = "float32",
    save_every: training.SaveEvery = 100,
    keep: training.Keep = 2,
    device: options.Device = "auto",
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
    from dataclasses import asdict

    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output
    from moectl.training.branch import branches
    from moectl.training.recipe import TrainRecipe
    from moectl.training.world import joined

    recipe = TrainRecipe(
        data=tuple(data),
        **asdict(steps),
        **asdict(schedule),
        dtype=dtype,
        seed=seed,
    )
    done: list[dict[str, Any]] = []
    with joined(device) as world:
        with world.agreed():
            recipe.check()
            if (out / "config.json").exists():
                raise UsageError(
                    f"{escape(str(out))} is a checkpoint.",
                    "Branches are put in a directory of their own.",
                    "Give another -o.",
                )
            wanted = branches(recipe, out, domain or ())
            source = Checkpoint.open(seed_model, revision)
            if world.is_main:
                out.mkdir(parents=True, exist_ok=True)
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
