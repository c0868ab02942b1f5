"""`moectl upcycle split`: one dense FFN becomes E experts of a part of it each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped
from moectl.cli.opening import opened
from moectl.errors import MoectlError

if TYPE_CHECKING:
    from moectl.checkpoint.source import Checkpoint
    from moectl.upcycle.split_statistics import Activations

SEQUENCE_LENGTH = 256
STATISTICS_SEQUENCES = 64
BATCH_SIZE = 8
HELDOUT_BATCHES = 4


@grouped
def split(
    dense: options.Dense,
    out: writing.Out,
    experts: Annotated[int, typer.Option(help="Parts the FFN is cut into.")] = 8,
    top_k: Annotated[
        int | None, typer.Option(help="Routed parts per token; all, which is exact, when left out.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How neurons are grouped: kmeans-gate, kmeans (gate and up rows), active (those active on the same "
            "tokens of --data: loses least), or random."
        ),
    ] = "kmeans-gate",
    shared: Annotated[
        int, typer.Option(help="Parts that are always active: the neurons most often active on --data.")
    ] = 0,
    router: Annotated[
        str, typer.Option(help="zero, analytic (mean gate rows), random, or auto: analytic if parts are left out.")
    ] = "auto",
    router_std: Annotated[float, typer.Option(help="Standard deviation of random router rows.")] = 0.02,
    scale: Annotated[
        str, typer.Option(help="What makes up for weights that sum to 1: auto (exact), updown, down, cbrt or none.")
    ] = "auto",
    into: options.Into = None,
    layers: options.MoeLayers = "all",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text for --shared, --method active and the loss before and after; built-in text when left out. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not measure the held-out loss before and after.")
    ] = False,
    aux_loss_coef: options.AuxLossCoef = 0.01,
    dtype: writing.Dtype = "auto",
    seed: options.Seed = 0,
    shard_size: writing.ShardSize = "5GB",
    revision: options.Revision = None,
    *,
    how: writing.Writing,
) -> None:
    """Cut a dense model's FFN into E experts (MoEfication, arXiv 2110.01786; LLaMA-MoE, arXiv 2406.16554).

    With all parts active the result computes the same function as DENSE. With --top-k below that it is smaller per
    token and worse: the held-out loss before and after is printed on stderr. Only training wins it back.

    Which neuron goes where, and when each is active, is kept in OUT.statistics, from where a command that is run
    again takes it.
    """
    from moectl.data.documents import EVERY_BUILTIN
    from moectl.report import output
    from moectl.upcycle.split import plan_split, split_pair
    from moectl.upcycle.split_recipe import SplitRecipe

    recipe = SplitRecipe(
        experts=experts,
        top_k=top_k,
        grouping=method,
        shared=shared,
        router=router,
        router_std=router_std,
        scale=scale,
        into=into,
        layers=layers,
        aux_loss_coef=aux_loss_coef,
        dtype=dtype,
        seed=seed,
        shard_bytes=output.parse_size(shard_size),
    )
    recipe.check()
    source = opened(dense, revision)
    split_pair(source, recipe)
    specs = tuple(data or EVERY_BUILTIN)
    with writing.statistics(out, [source], dry_run=how.dry_run) as place:
        plan = plan_split(source, recipe, _activations(source, specs, place) if recipe.measured else None, place)
        facts = plan.facts
        beside = f" and {shared} shared" if shared else ""
        writing.carry_out(
            plan,
            out,
            how,
            headline=f"{source.name} ({facts['source_family']}, {output.count(facts['source_parameters'])}) -> "
            f"{facts['family']}, {recipe.routed} experts{beside}, top {recipe.active}",
            against=(dense,) if facts["exact"] and not facts["dequantised"] else (),
        )
    if not (recipe.keeps_function or no_eval or how.quiet or how.dry_run) and (out / "config.json").exists():
        output.note(_loss_note(source, out, specs))


def _activations(source: Checkpoint, specs: tuple[str, ...], place: Path) -> Activations:
    from moectl.layerwise.first_text import first_sequences
    from moectl.upcycle.split_statistics import activations

    tokens = first_sequences(
        source,
        specs,
        SEQUENCE_LENGTH,
        STATISTICS_SEQUENCES,
        why="Which neurons are active when cannot be measured on it.",
        fix="Give --data more text.",
    )
    return activations(source, tokens, specs, place)


def _loss_note(source: Checkpoint, out: Path, specs: tuple[str, ...]) -> str:
    """The held-out loss of both models, domain by domain; or why it was not measured, as the output stands anyway."""
    from moectl.checkpoint.source import Checkpoint
    from moectl.evaluation.heldout import heldout_batches, heldout_loss
    from moectl.layerwise.memory import available_memory
    from moectl.layerwise.quiet import quiet
    from moectl.layerwise.tokenizer import encoder, load_tokenizer, separator
    from moectl.layerwise.whole import load

    made = Checkpoint.open(str(out))
    if 4 * sum(math.prod(ref.shape) for ref in made.tensors.values()) > available_memory() // 2:
        return "The held-out loss was not measured: the model in fp32 takes more than half of the free memory."
    try:
        tokenizer = load_tokenizer(source)
        batches = heldout_batches(
            specs,
            encoder(tokenizer),
            eos_id=separator(source, tokenizer),
            sequence_length=SEQUENCE_LENGTH,
            batch_size=BATCH_SIZE,
            max_batches=HELDOUT_BATCHES,
        )
        with quiet():
            before, after = (heldout_loss(load(checkpoint), batches) for checkpoint in (source, made))
    except MoectlError as error:
        return f"The held-out loss was not measured: {error.what}"
    lines = [f"  {domain}: {before[domain]:.3f} -> {after[domain]:.3f}" for domain in before]
    return "\n".join(["Held-out loss before and after, nats per token:", *lines])
