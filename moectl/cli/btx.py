"""`moectl upcycle btx`: several dense models of one origin become one Mixture-of-Experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped
from moectl.cli.opening import warn_of
from moectl.errors import UsageError

if TYPE_CHECKING:
    from moectl.upcycle.btx_recipe import BtxRecipe


@grouped
def btx(
    out: writing.Out,
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERT...",
            help="Dense models of one shape: directory, Hub id, hf://org/name@rev, or base+adapter (a PEFT LoRA).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON that says all of this, or a mergekit-moe config; - is stdin.",
            show_default=False,
        ),
    ] = None,
    include_seed: Annotated[
        str | None,
        typer.Option(metavar="SEED", help="The model they branched from: one more expert, and in the mean."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer is kept, who reads --data, and what --average base keeps."),
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="Everything but FFNs: mean, base, or one weight per model, such as 2,1,1. [default: mean]"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts each token is sent to. [default: 2]")] = None,
    into: options.Into = None,
    layers: Annotated[
        str | None, typer.Option(help="MoE layers: all, every:2, last:6, or 0,3,5. [default: all]")
    ] = None,
    split: Annotated[int | None, typer.Option(help="Experts each FFN is cut into. [default: 1]")] = None,
    scale: Annotated[
        str | None, typer.Option(help="What makes up for the cut: auto, updown, down, cbrt or none. [default: auto]")
    ] = None,
    router_init: Annotated[
        str | None, typer.Option(help="Router rows: random, text or embedding (cheap). [default: random]")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Texts of one expert's router row: one --data per EXPERT in order, the seed's last."),
    ] = None,
    router_std: Annotated[
        float | None, typer.Option(help="Standard deviation of random router rows. [default: 0.02]")
    ] = None,
    router_logit_std: Annotated[
        float | None,
        typer.Option(help="Standard deviation over experts of the logits on the texts. [default: 1.0]"),
    ] = None,
    router_tokens: Annotated[
        str | None, typer.Option(help="Which tokens of a text count: all or last. [default: all]")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of normal noise added to expert weights. [default: 0]")
    ] = None,
    aux_loss_coef: Annotated[
        float | None, typer.Option(help="Load-balancing loss coefficient in the config. [default: 0.01]")
    ] = None,
    allow_tokenizer_mismatch: Annotated[
        bool, typer.Option("--allow-tokenizer-mismatch", help="Mix models whose tokenizers differ all the same.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the base model), bfloat16, float16 or float32. [default: auto]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random. [default: 0]")] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest shard: bytes, or with kB, MB, GB, TB. [default: 5GB]")
    ] = None,
    *,
    how: writing.Writing,
) -> None:
    """Mix dense models into one MoE: an expert of each, everything else averaged (BTX, arXiv 2403.07816).

    The models must be of one shape and share a tokenizer: branches of one seed model. Averages are computed in
    float64 and rounded once. With --router-init text the base model (the seed, or else the first expert, without
    its adapter) reads the texts layer by layer, and the rows are kept in OUT.statistics, from where a command that is
    run again takes them. Options given beside --recipe stand before what it says. stdout is the path of OUT. The same
    command resumes after an interruption.
    """
    from moectl.report import output
    from moectl.upcycle.btx import plan_btx
    from moectl.upcycle.btx_models import open_models
    from moectl.upcycle.btx_recipe import Expert

    asked, notes = _recipe(experts, recipe)
    given: dict[str, Any] = {
        "include_seed": Expert(include_seed) if include_seed else None,
        "base": base,
        "average": average,
        "top_k": top_k,
        "into": into,
        "layers": layers,
        "split": split,
        "scale": scale,
        "router_init": router_init,
        "router_std": router_std,
        "router_logit_std": router_logit_std,
        "router_tokens": router_tokens,
        "noise": noise,
        "aux_loss_coef": aux_loss_coef,
        "dtype": dtype,
        "seed": seed,
        "shard_bytes": output.parse_size(shard_size) if shard_size else None,
        "allow_tokenizer_mismatch": allow_tokenizer_mismatch or None,
    }
    asked = replace(asked, **{name: value for name, value in given.items() if value is not None})
    asked = _with_data(asked, data)
    asked.check()
    for note in notes:
        output.note(note, quiet=how.quiet)
    models = open_models(asked)
    warn_of(models.sources)
    with writing.statistics(out, models.sources, dry_run=how.dry_run) as place:
        plan = plan_btx(models, asked, place)
        writing.carry_out(
            plan,
            out,
            how,
            headline=f"{', '.join(model.name for model in models.members)} ({plan.facts['source_family']}) -> "
            f"{plan.facts['family']}, {asked.num_experts} experts, top {asked.top_k}",
        )


def _recipe(experts: list[str] | None, recipe: str | None) -> tuple[BtxRecipe, tuple[str, ...]]:
    """The recipe that the arguments or a file ask for, and notes on how it was understood."""
    from moectl.upcycle.btx_recipe import BtxRecipe, Expert
    from moectl.upcycle.recipe_file import read_recipe

    if recipe is None:
        return BtxRecipe(tuple(Expert(name) for name in experts or ())), ()
    if experts:
        raise UsageError("EXPERT and --recipe were both given.", "Each names the models.", "Give one of the two.")
    return read_recipe(recipe)


def _with_data(recipe: BtxRecipe, data: list[str] | None) -> BtxRecipe:
    """The recipe with one data source for each of its experts."""
    if not data:
        return recipe
    if len(data) != len(recipe.members):
        raise UsageError(
            f"{len(data)} --data for {len(recipe.members)} models.",
            "Each model's router row is made of texts of its own.",
            "Give one --data per EXPERT, in their order, and one for the seed last.",
        )
    told = [replace(expert, data=(spec,)) for expert, spec in zip(recipe.members, data, strict=True)]
    seed = told.pop() if recipe.include_seed else None
    return replace(recipe, experts=tuple(told), include_seed=seed)
