"""`moectl inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options


def inspect(
    model: options.Model,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also read the weights: health of experts and routers.")
    ] = False,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Show family, sizes, parameters (total and active) and bytes by component of any checkpoint."""


