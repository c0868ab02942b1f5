"""`moectl compress qmoe`: experts quantised to ternary codes or uniform grids, one layer at a time."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped
from moectl.cli.opening import warn_of
from moectl.errors import InputError, MoectlError, UsageError
from moectl.launched import rank_and_size

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan
    from moectl.compress.pipeline.report import LayerReport
    from moectl.compress.qmoe_job import Job

_BUILTIN_COST = (
    "Experts are calibrated on built-in text: Python's own code and documentation, and sums. On text unlike that the "
    "model loses more than it has to. Give --data like what the model is for."
)
_PARTS = 1000
"""Steps of the progress bar."""


@grouped
def qmoe(
    model: options.Model,
    out: writing.Out,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Per expert weight. Less than 2 is a target for ternary weights, their code and all; 2, 3 and 4 are "
            "uniform grids. Left out: ternary, 0.9 and what a row takes besides.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[str, typer.Option(help="Weights beside the experts: int8, int4, or bf16 to leave them.")] = "int8",
    group_size: Annotated[
        int, typer.Option(help="Weights of a row that share a scale with --bits 2, 3 and 4; -1 for whole rows.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Levels as far below zero as above, so that `decompress --export` can.")
    ] = False,
    qmoe_compat: Annotated[
        bool, typer.Option("--qmoe-compat", help="Ternary levels and thresholds exactly as in the QMoE paper.")
    ] = False,
    code: Annotated[
        str, typer.Option(help="Of ternary weights: tunstall, or the paper's dictionary qmoe.")
    ] = "tunstall",
    export: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="w2a16 or w4a16: write what compressed-tensors and vLLM read, in place of our own format.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate on, built-in text when left out; loss is measured on its held-out part and on "
            "built-in text. Repeatable.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences to calibrate on; 128 when left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens of each; 512 when left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Fewer sequences, so as to stay below this.")] = None,
    min_tokens: Annotated[int, typer.Option(min=0, help="Experts given fewer are rounded to nearest.")] = 32,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Calibrate every expert on all tokens, routed to it or not.")
    ] = False,
    gate_weighted: Annotated[
        bool, typer.Option("--gate-weighted", help="Tokens count as much as their gate (MoEQuant's AGQ).")
    ] = False,
    batch_experts: Annotated[int, typer.Option(min=1, help="Experts quantised at once: memory against speed.")] = 16,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure the model before and after.")] = False,
    html: options.ReportPage = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="To calibrate in: auto (float32 on a CPU, else as stored), float32, bfloat16 or float16.",
            callback=options.known_dtype,
        ),
    ] = "auto",
    shard_size: writing.ShardSize = "5GB",
    revision: options.Revision = None,
    *,
    how: writing.WritingAlone,
) -> None:
    """Quantise the experts of MODEL by GPTQ and store them in a code: below one bit per weight where rows are wide.

    The model passes through memory one decoder layer at a time, with what the layers before it have become, so it fits
    wherever a layer does. Each finished layer is kept in OUT.statistics until OUT is complete, and the same command
    resumes there. Under torchrun the processes share the tokens and the experts. The result loads in transformers
    after `import moectl.integrations.transformers`, and `moectl decompress` makes it an ordinary checkpoint.
    """
    from dataclasses import replace

    from moectl.checkpoint.journal import check_recipe
    from moectl.checkpoint.publish import check_apart, disk_errors, exists_error, is_occupied
    from moectl.checkpoint.source import Checkpoint
    from moectl.compress.calibration import SAMPLES, Calibration
    from moectl.compress.pipeline.alone import alone
    from moectl.compress.pipeline.run import discard, is_finished
    from moectl.compress.qmoe_families import WARNINGS
    from moectl.compress.qmoe_job import Job
    from moectl.compress.qmoe_recipe import QmoeRecipe
    from moectl.report import output

    leads = rank_and_size()[0] == 0  # of torchrun's processes the first one speaks and writes
    how = replace(how, quiet=how.quiet or not leads)
    recipe = QmoeRecipe(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        compat=qmoe_compat,
        code=code,
        dense=dense,
        min_tokens=min_tokens,
        all_experts=all_experts,
        gate_weighted=gate_weighted,
        batch_experts=batch_experts,
        export=export,
        shard_bytes=output.parse_size(shard_size),
    ).checked()
    source = Checkpoint.open(model, revision)
    check_apart(out, source.path)
    warn_of([source] if leads else [])
    job = Job.of(
        source, recipe, Calibration(tuple(data) if data else None, samples, seq_len, max_tokens, device, dtype)
    )
    if not data and leads:
        output.warn(_BUILTIN_COST)
    if source.model_type in WARNINGS and leads:
        output.warn(WARNINGS[source.model_type])
    if job.sequences < (samples or SAMPLES) and max_tokens is None and leads:
        output.warn(f"There was text for {job.sequences} sequences of {samples or SAMPLES}.")
    place = writing.statistics_of(out)
    folder = place / job.key
    if is_occupied(out) and not (how.overwrite or how.dry_run):
        if not job.is_recorded_in(out):
            raise exists_error(out)
        if not is_finished(folder):  # else it was interrupted since, and is checked when it is written
            if leads:
                _already_made(out, folder, how, html)
            return
    if not (how.overwrite or how.dry_run):
        check_recipe(out, job.recorded)
    if leads:
        _show_estimate(job, how)
    if how.dry_run:
        return
    with alone(place) if leads else nullcontext(), disk_errors(None, place):
        with output.progress("compressing", _PARTS, quiet=how.quiet, unit="parts") as on_parts:
            paths = job.run(place, lambda _text: None, _steps(on_parts))
        if not leads:
            return
        plan, layers = job.plan(paths)
        writing.carry_out(
            plan,
            out,
            how,
            headline=f"{source.name} ({source.model_type}) -> {recipe.words}",
            then="" if recipe.export else f"moectl generate {shlex.quote(str(out))} --prompt ...",
            schema="moectl.compress/1",
            measure=lambda: _told(job, plan, layers, out, html, measured=not no_eval, how=how),
        )
        discard(folder)
    if place.exists():
        output.note(f"{place} has files of other runs: remove them if they are not to go on.", quiet=how.quiet)


def _show_estimate(job: Job, how: writing.Writing) -> None:
    """What it will take, roughly: as the result of a dry run, else as a line on stderr."""
    from dataclasses import asdict

    from moectl.report import output

    found = job.estimate
    if not how.dry_run:
        output.note(
            f"{output.count(found.experts)} expert weights to about {found.bits:.2f} bits each, calibrated on "
            f"{job.recorded['calibration']['tokens']:,} tokens: about {_duration(found.seconds)}, "
            f"{output.size(found.memory)} of memory, {output.size(found.scratch + found.output)} of disk on the way.",
            quiet=how.quiet,
        )
        return
    if how.json:
        output.emit_json("moectl.compress-estimate/1", {"recipe": job.recorded, **asdict(found)})
        return
    rows: list[tuple[str, output.Cell]] = [
        ("expert weights", found.experts),
        ("bits of each", round(found.bits, 3)),
        ("calibration tokens", job.recorded["calibration"]["tokens"]),
        ("seconds", round(found.seconds)),
        ("bytes of memory", found.memory),
        ("bytes of disk for activations", found.scratch),
        ("bytes of coded layers", found.output),
    ]
    output.emit_table(("what", "about"), rows, title="Estimate")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _steps(on_parts: Callable[[int], None]) -> Callable[[float], None]:
    """From the share of the work that is done to steps of a bar."""
    done = 0

    def advance(share: float) -> None:
        nonlocal done
        if int(share * _PARTS) > done:
            on_parts(int(share * _PARTS) - done)
            done = int(share * _PARTS)

    return advance


def _already_made(out: Path, folder: Path, how: writing.Writing, html: Path | None) -> None:
    """The end of a command that finds nothing to do but to check, to tidy up and to upload.

    Raises:
        UsageError: `out` was damaged or altered.
    """
    from moectl.checkpoint import hub
    from moectl.checkpoint.publish import exists_error
    from moectl.compress.pipeline.alone import alone
    from moectl.compress.pipeline.run import discard
    from moectl.report import output

    writing.say_checking(out, quiet=how.quiet)
    if not _is_untouched(out, quiet=how.quiet):
        raise exists_error(out)
    if folder.exists():
        with suppress(UsageError), alone(folder.parent):
            discard(folder)
    uploaded = hub.upload(out, how.push_to_hub) if how.push_to_hub is not None else None
    if how.json:
        found = {"path": str(out), "published": True, "already_complete": True, "uploaded": uploaded}
        output.emit_json("moectl.compress/1", found)
    else:
        output.emit_path(out)
    output.note("It was already complete.", quiet=how.quiet)
    if html is not None:
        output.warn("A page is written when a model is compressed, so there is none now. --overwrite does it again.")


def _is_untouched(out: Path, *, quiet: bool) -> bool:
    """Whether every tensor and file is as moectl.json records it."""
    from moectl.checkpoint.provenance import verify_hashes
    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output

    try:
        made = Checkpoint.open(out)
        with output.progress("checking", made.nbytes, quiet=quiet) as on_bytes:
            return verify_hashes(made, on_bytes).ok
    except InputError:
        return False


def _told(
    job: Job,
    plan: Plan,
    layers: Sequence[LayerReport],
    out: Path,
    html: Path | None,
    *,
    measured: bool,
    how: writing.Writing,
) -> dict[str, Any]:
    """What became of every expert and of the model, said on stderr and written as a page."""
    from time import perf_counter

    from moectl.compress.report import page, words
    from moectl.compress.report.summary import summary
    from moectl.layerwise.memory import resident
    from moectl.report import html as pages
    from moectl.report import output

    seconds, peak = perf_counter() - how.started, resident("VmHWM")
    change = _measured(job, out) if measured else None
    found = summary(
        job.source.name,
        layers,
        plan.facts,
        job.recipe.to_json(),
        {tensor.name: tensor.nbytes for tensor in plan.tensors},
        {matrix.parameter for layer in layers for matrix in layer.matrices},
        measured=change,
        about=job.recorded["calibration"],
        seconds=seconds,
        peak_bytes=peak,
    )
    output.note("\n".join(words.terminal(found)), quiet=how.quiet)
    if html is not None:
        pages.write(html, page.render(found, writing.whole_command(sys.argv)))
        output.note(f"Written: {html}", quiet=how.quiet)
    return words.to_json(found)


def _measured(job: Job, out: Path) -> dict[str, Any] | None:
    """Both models on held-out text; None, with the reason on stderr, where that cannot be: the output stands anyway."""
    from moectl.checkpoint.source import Checkpoint
    from moectl.data.documents import EVERY_BUILTIN
    from moectl.evaluation.change import change
    from moectl.layerwise.whole import load
    from moectl.report import output

    data = tuple(dict.fromkeys((*(job.calibration.data or ()), *EVERY_BUILTIN)))
    try:
        return change(job.source, Checkpoint.open(out), data, load, device=job.calibration.device).to_json()
    except MoectlError as error:
        output.note(f"The model was not measured: {error.what}")
        return None
