"""`moectl quickstart`: the whole story on a model trained here and now."""

from __future__ import annotations

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


