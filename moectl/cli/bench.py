"""`moectl bench`: how fast expert layers and models run, beside every peer that can be imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options
from moectl.errors import UsageError

if TYPE_CHECKING:
    from moectl.bench.run import Settings

app = typer.Typer(
    name="bench",
    help="Measure expert layers and models against their peers and the machine's own limits.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...", help="Presets (qwen3-30b-a3b, ...), directories, config.json files or Hub ids."
    ),
]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", metavar="d,f,E,k", help="A shape written out; repeatable.")
]
Tokens = Annotated[str | None, typer.Option(help="Tokens per call, as 1,16,128.", show_default=False)]
Dtype = Annotated[
    str | None, typer.Option(help="float32 (fp32), bfloat16 (bf16), float16 (fp16), float64; several with commas.")
]
Routing = Annotated[str, typer.Option(help="uniform, balanced, zipf:EXPONENT, hot:SHARE or trace:FILE.")]
TpSize = Annotated[int, typer.Option(min=1, help="Divide the expert width, as tensor parallelism does.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU.", show_default=False)]
Clock = Annotated[str, typer.Option(help="wall; or cpu, the CPU time of one thread, on a machine shared with others.")]
Time = Annotated[float, typer.Option(min=0.001, help="Seconds to measure each row for, about.")]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write a self-contained page.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON document.", show_default=False),
]
Baseline = Annotated[
    Path | None, typer.Option(metavar="FILE", help="An older result to compare with.", show_default=False)
]
FailSlower = Annotated[
    str | None, typer.Option(metavar="5%", help="Exit with 5 if a row is slower than in --baseline by more than this.")
]


@app.command("layer")
def layer(
    models: Models = None,
    shape: Shapes = None,
    tokens: Tokens = None,
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
    device: Device = "auto",
    threads: Threads = None,
    clock: Clock = "wall",
    time: Time = 0.5,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json: options.Json = False,
    html: Html = None,
    output: Output = None,
    baseline: Baseline = None,
    fail_slower: FailSlower = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure one expert layer: all backends on the same inputs, in turn, with errors, floors and memory.

    A backend that is not installed is a row with the reason. Without MODEL or --shape: qwen3-30b-a3b on a GPU, a small
    layer on a CPU.
    """
    from moectl.bench import peers, roofline, rows, run
    from moectl.report import output as report

    settings = _settings(models, shape, tokens, dtype, routing, tp_size, device, threads, clock, time, seed, revision)
    settings = _with(
        settings,
        what=_choices("--what", what, roofline.WHATS),
        backends=peers.choose(backend),
        graph=graph,
        compile=compile,
        check=check,
    )
    limit = _limit(baseline, fail_slower)
    say = _progress(quiet)
    if tune:
        from moectl.bench import tune as tuner

        path = tuner.tune(settings, tune_time, say, lambda reason: report.note(reason, quiet=quiet))
        report.note(f"Launch choices kept in {path}." if path else "Nothing was tuned.", quiet=quiet)
    if export is not None:
        _export(settings, export, quiet)
    document = run.measure(settings, say, _keep(output))
    _deliver(document, json=json, html=html, file=output, quiet=quiet)
    _gate(document, baseline, limit, quiet)
    rows.require_good(document)


@app.command("kernels")
def kernels(
    models: Models = None,
    shape: Shapes = None,
    tokens: Tokens = None,
    dtype: Dtype = None,
    routing: Routing = "uniform",
    tp_size: TpSize = 1,
    device: Device = "auto",
    threads: Threads = None,
    clock: Clock = "wall",
    time: Time = 0.5,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json: options.Json = False,
    html: Html = None,
    output: Output = None,
    baseline: Baseline = None,
    fail_slower: FailSlower = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure the stages of moectl's own layer: router, dispatch, forward, backward and what they are made of."""
    from moectl.bench import kernels as stages

    settings = _settings(models, shape, tokens, dtype, routing, tp_size, device, threads, clock, time, seed, revision)
    limit = _limit(baseline, fail_slower)
    document = stages.measure(settings, _progress(quiet), _keep(output))
    _deliver(document, json=json, html=html, file=output, quiet=quiet)
    _gate(document, baseline, limit, quiet)


@app.command("model")
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
    device: Device = "auto",
    threads: Threads = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json: options.Json = False,
    html: Html = None,
    output: Output = None,
    baseline: Baseline = None,
    fail_slower: FailSlower = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure whole models side by side: prefill, time to first token, decode, generate and memory.

    Several models, several backends of one, or both: a dense model against the MoE made of it, say.
    """
    from moectl.bench import device as machine
    from moectl.bench import models as whole

    names = [machine.pick(device).type]
    dtypes = _dtypes(dtype, names[0])
    if len(dtypes) > 1:
        raise UsageError("`bench model` takes one --dtype.", "A model is loaded once.", "Run it twice.")
    limit = _limit(baseline, fail_slower)
    backends = [word.strip() for word in backend.split(",") if word.strip()] if backend else [whole.AS_LOADED]
    settings = whole.Settings(
        models, backends, prompt, new_tokens, batch, rounds, dtypes[0], device, threads, seed, revision
    )
    document = whole.measure(settings, _progress(quiet))
    _deliver(document, json=json, html=html, file=output, quiet=quiet)
    _gate(document, baseline, limit, quiet)


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
        text = _read(path)
        if path == check:
            markdown.require_in_step(text, made, path)
            continue
        html.write(path, markdown.replaced(text, made, path))
        output.emit_path(path)


def _settings(
    models: list[str] | None,
    shapes: list[str] | None,
    tokens: str | None,
    dtype: str | None,
    routing: str,
    tp_size: int,
    device: str,
    threads: int | None,
    clock: str,
    seconds: float,
    seed: int,
    revision: str | None,
) -> Settings:
    """What `layer` and `kernels` have in common; the defaults depend on the device."""
    from moectl.bench import device as machine
    from moectl.bench.run import Settings
    from moectl.bench.shapes import choose

    _choices("--device", device, ("auto", "cpu", "cuda"))
    _choices("--clock", clock, ("wall", "cpu"))
    kind = machine.pick(device).type
    if not models and not shapes:
        models, shapes = (["qwen3-30b-a3b"], []) if kind == "cuda" else ([], ["512,256,32,4"])
    counts = _counts(tokens or ("1,16,128,4096,32768" if kind == "cuda" else "1,16,128"))
    return Settings(
        choose(models or [], shapes or [], tp_size, revision),
        counts,
        what=["fwd"],
        dtypes=_dtypes(dtype, kind),
        backends=[],
        routing=routing,
        device=device,
        threads=threads,
        seed=seed,
        clock=clock,
        seconds=seconds,
    )


def _with(settings: Settings, **changes: Any) -> Settings:
    from dataclasses import replace

    return replace(settings, **changes)


def _dtypes(text: str | None, kind: str) -> list[str]:
    from moectl.bench.device import DTYPES, SHORT

    words = [word.strip() for word in (text or ("bfloat16" if kind == "cuda" else "float32")).split(",")]
    return _choices("--dtype", ",".join(SHORT.get(word, word) for word in words), tuple(DTYPES))


def _choices(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    from moectl.text import shown

    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    unknown = [word for word in words if word not in allowed]
    if unknown:
        raise UsageError(f"{option} {shown(', '.join(unknown))} is unknown.", "", f"There are {', '.join(allowed)}.")
    return words


def _counts(text: str) -> list[int]:
    from moectl.text import shown

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise UsageError(f"--tokens {shown(text)} is not a list of counts.", "", "Write 1,16,128.")
    return list(dict.fromkeys(int(word) for word in words))


def _limit(baseline: Path | None, fail_slower: str | None) -> float | None:
    from moectl.bench.baseline import parse_limit, read

    if fail_slower is not None and baseline is None:
        raise UsageError(
            "--fail-slower needs --baseline.", "There is nothing to compare with.", "Give an older result."
        )
    if baseline is not None:
        read(baseline)  # before minutes of measuring, not after
    return None if fail_slower is None else parse_limit(fail_slower)


def _export(settings: Settings, export: tuple[str, Path], quiet: bool) -> None:
    import torch

    from moe_kernels import target
    from moectl.bench import device as machine
    from moectl.bench import tune
    from moectl.errors import MachineError
    from moectl.report import output

    engine, folder = export
    _choices("--export", engine, ("vllm",))
    device = machine.pick(settings.device)
    if device.type != "cuda":
        raise MachineError("--export needs a CUDA device.", "The choices are for one kind of GPU.", "Leave it out.")
    where = target.of(torch.empty(0, device=device))
    for shape in settings.shapes:
        path = tune.export_vllm(shape, where, folder)
        output.note(f"vLLM finds {path} with VLLM_TUNED_CONFIG_FOLDER={folder}.", quiet=quiet)


def _progress(quiet: bool) -> Any:
    """Say on a terminal what is being measured."""
    from moectl.report import output

    return lambda title: output.note(f"measuring {title}", quiet=quiet or not sys.stderr.isatty())


def _deliver(document: dict[str, Any], *, json: bool, html: Path | None, file: Path | None, quiet: bool) -> None:
    """The result on stdout, and into the files that were asked for."""
    from moectl.bench import page, tables
    from moectl.bench.baseline import SCHEMA
    from moectl.report import html as pages
    from moectl.report import output

    document |= _told(document)
    if file is not None:
        pages.write(file, output.json_text(SCHEMA, document))
    if html is not None:
        pages.write(html, page.render(document))
    if json:
        output.emit_json(SCHEMA, document)
    elif sys.stdout.isatty():
        for title, columns, rows in tables.short(document):
            output.emit_table(columns, rows, title)
    else:
        output.emit_table(*tables.full(document))
    output.note(document["finding"] + ".", quiet=quiet)
    for reason in tables.missing(document):
        if reason.startswith(("moectl:", "moectl at ")):
            output.warn(f"not measured: {reason}")
        else:
            output.note("  " + reason, quiet=quiet or not sys.stderr.isatty())


def _told(document: dict[str, Any]) -> dict[str, str]:
    """The command, and what came of it in one sentence."""
    import shlex

    from moectl.bench import tables

    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return {"command": shlex.join(["moectl", *words]), "finding": tables.finding(document)}


def _keep(file: Path | None) -> Callable[[dict[str, Any]], None] | None:
    """What writes --output while there is more to measure, so that a run that is stopped leaves what it has."""
    from moectl.bench.baseline import SCHEMA
    from moectl.report import html, output

    if file is None:
        return None
    return lambda document: html.write(file, output.json_text(SCHEMA, document | _told(document)))


def _gate(document: dict[str, Any], baseline: Path | None, limit: float | None, quiet: bool) -> None:
    from moectl.bench.baseline import compare, read
    from moectl.report import output

    if baseline is None:
        return
    found = compare(document, read(baseline))
    for name, ratio in found.ratios.items():
        output.note(f"{name}: {ratio:.3g} of the time in the baseline", quiet=quiet)
    for name in found.gone:
        output.warn(f"{name} is in the baseline and was not measured now.")
    for name in found.new:
        output.note(f"{name} is not in the baseline.", quiet=quiet)
    if limit is not None:
        found.require(limit)


def _read(path: Path) -> str:
    from moectl.errors import InputError
    from moectl.text import shown

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(str(path))} cannot be read: {shown(str(error))}.", "", "Check the path.") from error
