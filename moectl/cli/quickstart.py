"""`moectl quickstart`: the whole story on models trained here and now."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from moectl.cli import checks, options


def quickstart(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to put the models.", callback=checks.place)
    ] = Path("quickstart"),
    seed_steps: Annotated[int, typer.Option(min=1, help="Training steps of the seed, 4096 tokens each.")] = 150,
    branch_steps: Annotated[int, typer.Option(min=1, help="Training steps of each branch, 2048 tokens each.")] = 60,
    moe_steps: Annotated[int, typer.Option(min=1, help="Training steps of the mixture, 2048 tokens each.")] = 150,
    seed: options.Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell the story of Branch-Train-MiX: a seed, three branches, a mixture of them, and a table of what it was worth.

    Needs nothing: the text comes with Python. Takes about three minutes on two cores.
    """
    # By default OpenMP threads spin for milliseconds while they wait. Beside another busy process that made a training
    # step take 1.0 s instead of 0.3 s, up to 6 s beside a second one of this kind; a short spin costs nothing alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    from dataclasses import asdict

    from moectl.quickstart import Steps, rows, served_rows
    from moectl.quickstart import quickstart as tell
    from moectl.report import output
    from moectl.training.byte_llama import DOMAINS

    steps = Steps(seed_steps, branch_steps, moe_steps)
    with output.progress("training", steps.total, quiet=quiet, unit="steps") as advance:
        told = tell(
            directory,
            steps=steps,
            seed=seed,
            overwrite=overwrite,
            say=lambda text: output.note(text, quiet=quiet),
            on_step=lambda _metrics: advance(1),
        )
    if json:
        output.emit_json("moectl.quickstart/2", asdict(told))
    else:
        output.emit_table(("model", *DOMAINS, "mean", ""), rows(told), title="Held-out loss, nats per byte")
        output.emit_table(("expert", *DOMAINS, "serves"), served_rows(told), title="Share of each domain's bytes")
    output.note(
        f"Done in {told.seconds:.0f} s. Upcycling the seed to 8 experts moved no logit by more than "
        f"{told.max_logit_difference:.1e}.\n"
        f'The mixture is an ordinary checkpoint: AutoModelForCausalLM.from_pretrained("{told.path}")\n'
        f"Next: moectl analyze-routing {shlex.quote(told.path)} --html routing.html",
        quiet=quiet,
    )
