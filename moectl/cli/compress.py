"""`moectl compress`: a Mixture-of-Experts checkpoint made smaller."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped
from moectl.cli.opening import opened
from moectl.cli.qmoe import qmoe
from moectl.errors import MoectlError

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan
    from moectl.checkpoint.source import Checkpoint
    from moectl.compress.prune.scores import Scores

_BUILTIN_COST = (
    "Experts are chosen on built-in text: Python's own code and documentation, and sums. What other text needs may be "
    "among what is removed, down to writing that breaks. Give --data like what the model is for."
)

app = typer.Typer(
    name="compress",
    help="Make a Mixture-of-Experts checkpoint smaller.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def compress() -> None:
    """Make a Mixture-of-Experts checkpoint smaller."""


app.command("qmoe")(qmoe)


@app.command()
@grouped
def prune(
    model: options.Model,
    out: writing.Out,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the experts of every layer to remove.", show_default=False)
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Experts to keep in every layer, in place of --ratio.", show_default=False)
    ] = None,
    method: Annotated[
        str, typer.Option(help="What says how much an expert matters: reap, frequency, ean, aimer or naee.")
    ] = "reap",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to choose experts on, built-in text when left out; loss and generation are measured on its "
            "held-out part and on built-in text. Repeatable.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences to choose on; 128 when left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens of each; 512 when left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Fewer sequences, so as to stay below this.")] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="A .safetensors file of how much experts matter: read if it is there, made if not.",
            show_default=False,
        ),
    ] = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not measure loss and generation before and after.")
    ] = False,
    html: options.ReportPage = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="To measure in: auto (float32 on a CPU, else as stored), float32, bfloat16 or float16.",
            callback=options.known_dtype,
        ),
    ] = "auto",
    shard_size: writing.ShardSize = "5GB",
    revision: options.Revision = None,
    *,
    how: writing.Writing,
) -> None:
    """Remove the experts of MODEL that matter least, the same number in every layer: a standard smaller checkpoint.

    How much they matter is measured on --data by running the model one layer at a time, so it fits wherever a layer
    does, and is kept in OUT.statistics or in --scores, from where any other ratio follows without running the model.
    What stays is good on text like --data: loss and generation on its held-out part are printed domain by domain.
    """
    from moectl.compress.calibration import Calibration
    from moectl.compress.prune.calibration import scores_for
    from moectl.compress.prune.layout import layout_of
    from moectl.compress.prune.plan import plan_prune
    from moectl.compress.prune.recipe import PruneRecipe
    from moectl.compress.prune.scores import never_routed
    from moectl.data.documents import EVERY_BUILTIN
    from moectl.report import output

    recipe = PruneRecipe(method, ratio, keep, output.parse_size(shard_size))
    recipe.check()
    source = opened(model, revision)
    layout = layout_of(source)
    if layout.extra:
        output.warn(f"{len(layout.extra)} tensors of layers that predict further tokens are left out.")
    calibration = Calibration(tuple(data) if data else None, samples, seq_len, max_tokens, device, dtype)
    file = None if scores is None or (how.dry_run and not scores.exists()) else scores
    with writing.statistics(out, [source], dry_run=how.dry_run) as place:
        measured = scores_for(layout, recipe, calibration, place, file, lambda text: output.note(text, quiet=how.quiet))
    if measured and (unseen := never_routed(measured)):
        output.note(f"{unseen} of {len(layout.layers) * layout.experts} experts were given no token.", quiet=how.quiet)
    if measured and measured.about.get("data") == list(EVERY_BUILTIN):
        output.warn(_BUILTIN_COST)
    plan = plan_prune(layout, recipe, measured)
    facts = plan.facts
    specs = tuple(dict.fromkeys((*(data or ()), *EVERY_BUILTIN)))
    writing.carry_out(
        plan,
        out,
        how,
        headline=f"{source.name} ({source.model_type}, {output.count(facts['source_parameters'])}) -> "
        f"{facts['experts']} of {facts['source_experts']} experts, top {facts['top_k']}",
        against=(model,) if facts["exact"] else (),
        schema="moectl.compress/1",
        measure=lambda: _told(
            plan, measured, out, html, () if no_eval or facts["exact"] else specs, device, quiet=how.quiet
        ),
    )


def _told(
    plan: Plan, scores: Scores | None, out: Path, html: Path | None, specs: tuple[str, ...], device: str, *, quiet: bool
) -> dict[str, Any]:
    """What became of the model, measured on `specs`, said on stderr and written as a page."""
    from moectl.compress.prune.page import render
    from moectl.report import html as pages
    from moectl.report import output

    found = _probed(plan.sources[0], out, specs, device, quiet=quiet) if specs else {}
    if html is not None and scores is None:
        output.warn("No expert was removed, so there is no page about it.")
    elif html is not None and scores is not None:
        pages.write(html, render(plan, scores, found.get("domains", {}), writing.whole_command(sys.argv)))
        output.note(f"Written: {html}", quiet=quiet)
    return found


def _probed(source: Checkpoint, out: Path, specs: tuple[str, ...], device: str, *, quiet: bool) -> dict[str, Any]:
    """Loss and generation of both models by domain, said on stderr; or why not, as the output stands anyway."""
    from moectl.checkpoint.source import Checkpoint
    from moectl.evaluation.probe import probe_checkpoints
    from moectl.report import output

    try:
        found = probe_checkpoints(source, Checkpoint.open(out), specs, device)
    except MoectlError as error:
        output.note(f"Loss and generation were not measured: {error.what}")
        return {}
    lines = [
        f"  {domain}: loss {each.loss_before:.3f} -> {each.loss_after:.3f}, "
        f"repetition {each.repeated_before:.0%} -> {each.repeated_after:.0%}, "
        f"surprise {each.surprise_before:.2f} -> {each.surprise_after:.2f}"
        for domain, each in found.items()
    ]
    head = "Held-out loss (nats per token), and greedy text: repeated 4-grams, and its loss under MODEL:"
    output.note("\n".join([head, *lines]), quiet=quiet)
    for domain, each in found.items():
        if each.broken:
            output.warn(f"Generation breaks on {domain}: {each.broken}. Remove fewer experts, or choose on such text.")
    return {"domains": {domain: each.to_json() for domain, each in found.items()}}
