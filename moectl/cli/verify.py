"""`moectl verify`: is a checkpoint what its plan promised, and the function it came from?"""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options


def verify(
    model: options.Model,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also compare fp32 logits with this model.", show_default=False)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest allowed max|difference| / max|logit| with --against.")
    ] = 1e-5,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Random ids to compare; longer than any sliding window when left out.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    write_card: Annotated[bool, typer.Option("--write-card", help="Record the comparison in MODEL's README.md.")] = False,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Re-hash every tensor of MODEL against its moectl.json; with --against, compare logits with another model.

    Exits with 5 if a hash differs or the difference is above --tolerance.
    """


