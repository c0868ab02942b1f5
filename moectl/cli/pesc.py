"""`moectl upcycle pesc`: adapters as experts, in a directory that PEFT loads."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped


@grouped
def pesc(
    dense: options.Dense,
    out: writing.Out,
    experts: Annotated[int, typer.Option(help="Adapters per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Adapters each token is sent to.")] = 2,
    adapter_dim: Annotated[int, typer.Option(help="Width of an adapter.")] = 512,
    scale: Annotated[float, typer.Option(help="Factor on the adapters' output.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Dropout where the adapters read, in training.")] = 0.0,
    layers: Annotated[str, typer.Option(help="Layers to adapt: all, every:2, last:6, or 0,3,5.")] = "all",
    aux_loss_coef: Annotated[float, typer.Option(help="Weight of the load-balancing loss in training.")] = 0.01,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA on all linear layers beside them; 0 for none.")] = 0,
    lora_alpha: Annotated[int, typer.Option(help="LoRA's scale times its rank.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: options.Seed = 0,
    materialize: Annotated[
        bool, typer.Option("--materialize", help="Refused: no MoE family can hold adapters behind the FFN.")
    ] = False,
    revision: options.Revision = None,
    *,
    how: writing.WritingAlone,
) -> None:
    """Make a PEFT adapter that puts E adapters and a router behind each FFN of DENSE (PESC, arXiv 2401.02731).

    The model with it computes what DENSE computes, bit for bit, until it is trained. Of DENSE only the config is
    read. stdout is the path of OUT, which PEFT loads once `moectl.integrations.pesc` is imported.
    """
    import shlex

    from moectl.checkpoint.publish import check_apart
    from moectl.errors import UsageError
    from moectl.report import output
    from moectl.upcycle.pesc import Base, PescRecipe, plan_pesc

    if materialize:
        raise UsageError(
            "PESC adapters cannot be materialised as a MoE checkpoint.",
            "They stand behind the FFN, after its last matrix, and no MoE family has anything there.",
            "Leave --materialize out and load OUT with PEFT, or make experts of FFNs with `moectl upcycle sparse`.",
        )
    recipe = PescRecipe(
        experts=experts,
        top_k=top_k,
        adapter_dim=adapter_dim,
        scale=scale,
        dropout=dropout,
        aux_loss_coef=aux_loss_coef,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        layers=layers,
        dtype=dtype,
        seed=seed,
    )
    recipe.check()
    base = Base.open(dense, revision)
    check_apart(out, base.path)
    plan = plan_pesc(base, recipe)
    writing.carry_out(
        plan,
        out,
        how,
        headline=f"{base.name} ({base.family.model_type}) -> adapter of {output.count(plan.parameters)}, "
        f"{experts} experts, top {top_k}",
        then=f"moectl train {shlex.quote(str(out))} -o TRAINED --data DATA; docs/pesc.md says more",
    )
