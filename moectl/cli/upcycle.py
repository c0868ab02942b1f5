"""`moectl upcycle`: dense checkpoints become a Mixture-of-Experts."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options, training, writing
from moectl.cli.btx import btx
from moectl.cli.groups import grouped
from moectl.cli.opening import opened
from moectl.cli.pesc import pesc
from moectl.cli.split import split

app = typer.Typer(
    help="Turn dense checkpoints into a Mixture-of-Experts checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def upcycle() -> None:
    """Turn dense checkpoints into a Mixture-of-Experts checkpoint."""


@app.command("sparse")
@grouped
def sparse(
    dense: options.Dense,
    out: writing.Out,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts each token is sent to.")] = 2,
    into: options.Into = None,
    layers: options.MoeLayers = "all",
    granularity: Annotated[int, typer.Option(help="Experts each copy of the FFN is cut into.")] = 1,
    scale: Annotated[
        str, typer.Option(help="What makes up for the cut: auto (exact), updown, down, cbrt or none.")
    ] = "auto",
    shared_experts: Annotated[
        bool, typer.Option("--shared-experts", help="Keep the FFN as an always-active expert too, half and half.")
    ] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Keep the FFN as an always-active expert; routed ones start at zero.")
    ] = False,
    drop: Annotated[float, typer.Option(help="Share of each expert's neurons drawn anew (Drop-Upcycling).")] = 0.0,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Shuffle the neurons of each copy before the cut.")
    ] = False,
    reinit: Annotated[float, typer.Option(help="Share of each expert's weights drawn anew (Qwen2-MoE).")] = 0.0,
    router_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the normal router weights: 0.02 when left out, or 0 where only that is exact.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of normal noise added to every expert weight; 0 is exact.")
    ] = 0.0,
    aux_loss_coef: options.AuxLossCoef = 0.01,
    router: training.Router = None,
    dtype: writing.Dtype = "auto",
    seed: options.Seed = 0,
    shard_size: writing.ShardSize = "5GB",
    revision: options.Revision = None,
    *,
    how: writing.Writing,
) -> None:
    """Copy a dense model's FFN into E experts per layer and add a router (sparse upcycling, arXiv 2212.05055).

    The result computes the same function as DENSE (unless --noise, --drop, --reinit or --scale give that up),
    loads in transformers and vLLM, and is written at disk speed in constant memory. stdout is the path of OUT.
    The same command resumes after an interruption. With --router it is a research checkpoint, which moectl alone loads.

    Workers share nothing but the disk: the last one publishes, as does moectl finish OUT. One that ends before
    prints nothing on stdout (with --json, a document that says "published": false) and exits with 0.
    """
    from moectl.report import output
    from moectl.upcycle.recipe import SparseRecipe
    from moectl.upcycle.sparse import plan_sparse

    recipe = SparseRecipe(
        experts=experts,
        top_k=top_k,
        into=into,
        layers=layers,
        granularity=granularity,
        scale=scale,
        shared_experts=shared_experts,
        residual=residual,
        drop=drop,
        shuffle=shuffle,
        reinit=reinit,
        router_std=router_std,
        noise=noise,
        aux_loss_coef=aux_loss_coef,
        dtype=dtype,
        seed=seed,
        shard_bytes=output.parse_size(shard_size),
    )
    recipe.check()
    source = opened(dense, revision)
    training.caution(router)
    plan = plan_sparse(source, recipe)
    facts = plan.facts
    if router is not None:
        from moectl.layerwise.routed import routed_plan

        plan = routed_plan(plan, router, seed)
    writing.carry_out(
        plan,
        out,
        how,
        headline=f"{source.name} ({facts['source_family']}, {output.count(facts['source_parameters'])}) -> "
        f"{facts['family']}, {experts} experts, {f'routed by {router}' if router else f'top {top_k}'}",
        # transformers may not run a quantised source, and another router computes another function
        against=() if facts["dequantised"] or router else (dense,),
    )


app.command("btx")(btx)
app.command("split")(split)
app.command("pesc")(pesc)
