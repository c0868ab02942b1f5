"""`moectl quickstart`: the whole story on a model trained here and now."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from moectl.cli import options


def quickstart(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the two models.")] = Path("quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 4096 tokens.")] = 200,
    seed: options.Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a byte-level Llama of about 1M parameters, upcycle it to 8 experts, verify and compare.

    Needs nothing: the text comes with Python. Takes about a minute and a half on two cores.
    """
    # By default OpenMP threads spin for milliseconds while they wait. Beside another busy process that made a training
    # step take 1.0 s instead of 0.3 s, up to 6 s beside a second one of this kind; a short spin costs nothing alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    from dataclasses import asdict

    from moectl.quickstart import quickstart as tell
    from moectl.quickstart import rows
    from moectl.report import output

    with output.progress("training", steps, quiet=quiet, unit="steps") as advance:
        story = tell(
            directory,
            steps=steps,
            seed=seed,
            overwrite=overwrite,
            say=lambda text: output.note(text, quiet=quiet),
            on_step=lambda _step, _loss: advance(1),
        )
    if json:
        output.emit_json("moectl.quickstart/1", asdict(story))
    else:
        output.emit_table(("", "dense", f"{story.experts} experts, top {story.top_k}"), rows(story))
    output.note(
        f"Done in {story.seconds:.0f} s. The MoE is an ordinary checkpoint:\n"
        f'  AutoModelForCausalLM.from_pretrained("{story.moe.path}")\n'
        f"Next: moectl inspect {shlex.quote(story.moe.path)} --weights",
        quiet=quiet,
    )
