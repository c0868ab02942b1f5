"""`moectl average`: several dense models of one origin become their weight average."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import writing
from moectl.cli.groups import grouped
from moectl.cli.opening import warn_of


@grouped
def average(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Dense models of one shape: directory, Hub id, hf://org/name@rev, or base+adapter (a PEFT LoRA).",
        ),
    ],
    out: writing.Out,
    weights: Annotated[
        str | None, typer.Option(help="One weight per model, such as 2,1,1; equal ones when left out.")
    ] = None,
    dtype: writing.Dtype = "auto",
    shard_size: writing.ShardSize = "5GB",
    allow_tokenizer_mismatch: Annotated[
        bool, typer.Option("--allow-tokenizer-mismatch", help="Average models whose tokenizers differ all the same.")
    ] = False,
    *,
    how: writing.Writing,
) -> None:
    """Average the weights of dense models, in float64 and rounded once: what a mixture of them has to beat.

    The models must be of one shape and share a tokenizer: branches of one seed model. stdout is the path of OUT. The
    same command resumes after an interruption.
    """
    from moectl.report import output
    from moectl.upcycle.average import plan_average, weights_of
    from moectl.upcycle.btx_models import open_models
    from moectl.upcycle.btx_recipe import BtxRecipe, Expert

    recipe = BtxRecipe(
        tuple(Expert(name) for name in models),
        average=weights or "mean",
        top_k=1,
        dtype=dtype,
        shard_bytes=output.parse_size(shard_size),
        allow_tokenizer_mismatch=allow_tokenizer_mismatch,
    )
    weights_of(recipe)
    recipe.check()
    opened = open_models(recipe)
    warn_of(opened.sources)
    plan = plan_average(opened, recipe)
    names = ", ".join(model.name for model in opened.members)
    writing.carry_out(plan, out, how, headline=f"{names} ({plan.facts['family']}) -> their weight average")
