"""`moectl bench`: how fast expert layers and models run, beside every peer that can be imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.cli import options
from moectl.cli.benching import (
    Delivery,
    Dtype,
    Layers,
    Routing,
    Threads,
    Time,
    Timing,
    TpSize,
    choices,
    dtypes_of,
    export_choices,
    read_text,
    settings_of,
)
from moectl.cli.groups import grouped
from moectl.errors import UsageError

app = typer.Typer(
    name="bench",
    help="Measure expert layers and models against their peers and the machine's own limits.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


KERNELS: dict[str, dict[str, Any]] = {
    "stages": {},
    "ternary": {"presets": ["mixtral-8x7b", "qwen3-30b-a3b"], "counts": "1,2,4,8,32"},
}
"""What `bench kernels` measures, and what it measures by default."""


@dataclass(frozen=True, slots=True)
class ShortTiming(Timing):
    """The same where there are many rows."""

    time: Time = 0.1


@app.command("layer")
@grouped
def layer(
    layers: Layers,
    what: Annotated[
        str, typer.Option(help="fwd, bwd, train (both) or decode (a CUDA graph); several with commas.")
    ] = "fwd",
    backend: Annotated[str, typer.Option(help="Backends with commas, or all.")] = "all",
    dtype: Dtype = None,
    routing: Routing = "uniform",
    graph: Annotated[bool, typer.Option("--graph", help="Replay a CUDA graph instead of calling.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run every backend under torch.compile.")] = False,
    check: Annotated[
        bool, typer.Option(help="Compare with float64 beside every time; too large an error exits with 5.")
    ] = True,
    tune: Annotated[bool, typer.Option("--tune", help="First find launch choices for this GPU and keep them.")] = False,
    tune_time: Annotated[float, typer.Option(min=1, help="Seconds of --tune per shape, dtype and tokens.")] = 60,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="vllm DIR", help="Write the launch choices for another engine.", show_default=False),
    ] = None,
    tp_size: TpSize = 1,
    *,
    timing: Timing,
    delivery: Delivery,
) -> None:
    """Measure one expert layer: all backends on the same inputs, in turn, with errors, floors and memory.

    A backend that is not installed is a row with the reason. Without MODEL or --shape: qwen3-30b-a3b on a GPU, a small
    layer on a CPU.
    """
    from moectl.bench import peers, roofline, rows, run
    from moectl.report import output as report

    settings = settings_of(layers, timing, dtype, routing, tp_size)
    settings = replace(
        settings,
        what=choices("--what", what, roofline.WHATS),
        backends=peers.choose(backend),
        graph=graph,
        compile=compile,
        check=check,
    )
    if tune:
        from moectl.bench import tune as tuner

        path = tuner.tune(
            settings, tune_time, delivery.announce, lambda reason: report.note(reason, quiet=delivery.quiet)
        )
        report.note(f"Launch choices kept in {path}." if path else "Nothing was tuned.", quiet=delivery.quiet)
    if export is not None:
        export_choices(settings, export, delivery.quiet)
    document = run.measure(settings, delivery.announce, delivery.keep)
    delivery.hand_over(document)
    rows.require_good(document)


@app.command("kernels")
@grouped
def kernels(
    layers: Layers,
    what: Annotated[str, typer.Option(help="stages, or ternary: products with coded experts beside dense ones.")] = (
        "stages"
    ),
    dtype: Dtype = None,
    routing: Routing = "uniform",
    tp_size: TpSize = 1,
    *,
    timing: Timing,
    delivery: Delivery,
) -> None:
    """Measure the stages of moectl's own layer, from the router to the backward pass; or ternary experts.

    With --what ternary and without MODEL or --shape: mixtral-8x7b and qwen3-30b-a3b on a GPU.
    """
    from moectl.bench import kernels as stages
    from moectl.bench import ternary

    if len(choices("--what", what, tuple(KERNELS))) > 1:
        raise UsageError("`bench kernels` takes one --what.", "They have different tables.", "Run it twice.")
    settings = settings_of(layers, timing, dtype, routing, tp_size, **KERNELS[what])
    measure = ternary.measure if what == "ternary" else stages.measure
    delivery.hand_over(measure(settings, delivery.announce, delivery.keep))


@app.command("routers")
@grouped
def routers(
    layers: Layers,
    router: Annotated[
        str | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,...],...", help="Some of them; all by default.", show_default=False),
    ] = None,
    dtype: Dtype = None,
    *,
    timing: ShortTiming,
    delivery: Delivery,
) -> None:
    """Measure every router: tokens per second, balance, and the share it drops; beside plain torch where ours is fused.

    Each takes the shape's top-k, but one that sends a token to one expert stays so. `moectl routers` lists them.
    """
    from moectl.bench import routers as routing

    settings = settings_of(layers, timing, dtype)
    settings = replace(settings, backends=[router] if router else [])
    delivery.hand_over(routing.measure(settings, delivery.announce, delivery.keep))


@app.command("model")
@grouped
def model(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories, Hub ids or hf://org/name@rev.")],
    backend: Annotated[
        str | None,
        typer.Option(help="Experts backends with commas: eager, grouped_mm, moectl, ...", show_default=False),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a GPU, else float32.", show_default=False)] = None,
    device: options.Device = "auto",
    threads: Threads = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    *,
    delivery: Delivery,
) -> None:
    """Measure whole models side by side: prefill, time to first token, decode, generate and memory.

    Several models, several backends of one, or both: a dense model against the MoE made of it, say.
    """
    from moectl.bench import device as machine
    from moectl.bench import models as whole

    names = [machine.pick(device).type]
    dtypes = dtypes_of(dtype, names[0])
    if len(dtypes) > 1:
        raise UsageError("`bench model` takes one --dtype.", "A model is loaded once.", "Run it twice.")
    backends = [word.strip() for word in backend.split(",") if word.strip()] if backend else [whole.AS_LOADED]
    settings = whole.Settings(
        models, backends, prompt, new_tokens, batch, rounds, dtypes[0], device, threads, seed, revision
    )
    delivery.hand_over(whole.measure(settings, delivery.announce))


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What --output has written.")],
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="README.md", help="Put the tables between their markers in this file.", show_default=False
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="README.md", help="Exit with 5 unless this file's tables are in step.", show_default=False
        ),
    ] = None,
) -> None:
    """Make markdown tables of results: on stdout, or in a file between <!-- bench NAME --> and <!-- /bench NAME -->."""
    from moectl.bench import markdown
    from moectl.report import html, output

    made = markdown.tables(files)
    if write is None and check is None:
        sys.stdout.write("\n\n".join(made.values()) + "\n")
    for path in (write, check):
        if path is None:
            continue
        text = read_text(path)
        if path == check:
            markdown.require_in_step(text, made, path)
            continue
        html.write(path, markdown.replaced(text, made, path))
        output.emit_path(path)
