"""`moectl upcycle`: dense checkpoints become a Mixture-of-Experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli import options

app = typer.Typer(
    help="Turn dense checkpoints into a Mixture-of-Experts checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def upcycle() -> None:
    """Turn dense checkpoints into a Mixture-of-Experts checkpoint."""


@app.command("sparse")
def sparse(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="Directory, Hub id or hf://org/name@rev.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts each token is sent to.")] = 2,
    into: Annotated[str | None, typer.Option(help="MoE family to write; the family's default when left out.")] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the normal router weights.")] = 0.02,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of normal noise added to every expert weight; 0 is exact.")
    ] = 0.0,
    aux_loss_coef: Annotated[float, typer.Option(help="Load-balancing loss coefficient in the config.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="auto (as the source), bfloat16, float16 or float32.")] = "auto",
    seed: options.Seed = 0,
    shard_size: Annotated[str, typer.Option(help="Largest shard: bytes, or with kB, MB, GB, TB.")] = "5GB",
    revision: options.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a dense model's FFN into E experts per layer and add a router (sparse upcycling, arXiv 2212.05055).

    The result computes the same function as DENSE (with --noise 0), loads in transformers and vLLM, and is
    written at disk speed in constant memory. stdout is the path of OUT. The same command resumes after an
    interruption.
    """
    from moectl.report.upcycle import run_sparse
    from moectl.upcycle.sparse import SparseRecipe

    raise NotImplementedError


