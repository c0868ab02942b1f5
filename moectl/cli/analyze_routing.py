"""`moectl analyze-routing`: how a Mixture-of-Experts model routes, and what it means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options, writing
from moectl.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from moectl.routing.masking import Mask
    from moectl.routing.report import Report
    from moectl.routing.rerun import Losses
    from moectl.routing.spelling import Spell
    from moectl.routing.study import Study
    from moectl.routing.weights import Alike

BUILTIN = ("builtin:code", "builtin:prose", "builtin:arithmetic")


def analyze_routing(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_TRACE",
            help="Directory, Hub id or hf://org/name@rev; or a trace, of --trace or of another engine.",
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OTHER]...",
            help="What to compare it with, on the same tokens; several are checkpoints in their order.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: a file, a directory, a Hub dataset; built-in text when left out. Repeatable.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a self-contained page.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also keep who went where, of whole documents.", show_default=False),
    ] = None,
    trace_size: Annotated[str, typer.Option(metavar="SIZE", help="The most that is kept, as 500MB.")] = "256MiB",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERTS",
            help="Measure the loss without them too: kept:1, removed:2, or 3:17,5:4-7 (layer:experts). Repeatable.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare the experts' weights and the routers' rows too.")
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 5 if true of a layer: 'max_vio>2', '3.effective<4', 'unseen>0'.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 65536,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens a model sees at once; 1024, or what it can take, when left out.", show_default=False
        ),
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate after each document, recorded too.")] = 0,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="One layer in memory at a time, for models larger than it.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help="The kind of trace, where it cannot be told from its content.", show_default=False),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer, of a trace that does not say.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts per token, of a trace that does not say.", show_default=False)
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers, dense ones too, of a flat trace that does not say.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer makes words of a trace's token ids.", show_default=False),
    ] = None,
    olmoe_compat: Annotated[
        bool, typer.Option("--olmoe-compat", help="Count pairs of adjacent ranks only, as OLMoE's released code does.")
    ] = False,
    fixed_order: Annotated[
        bool, typer.Option("--fixed-order", help="Experts by number, not by load, in the heat strip.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU, else as stored), float32, bfloat16 or float16.")
    ] = "auto",
    experts_implementation: Annotated[
        str | None,
        typer.Option(help="How experts run: eager, batched_mm, grouped_mm or moectl.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the trace in DIR.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Record which experts every token goes to, and say what it means: balance, domains, words, locality, each beside
    what chance gives.

    The table has a row per layer; the verdict and what stands out go to stderr. With OTHER, both read the same text and
    are compared token by token; of several, each with the last.
    """
    from moectl.report import output
    from moectl.routing import gate
    from moectl.routing.report import report
    from moectl.routing.study import is_model

    conditions = [gate.parse(text) for text in fail_on or ()]
    most = output.parse_size(trace_size)
    _require_places(trace, html, overwrite)
    sources = [model, *(others or ())]
    run = [format is None and is_model(source) for source in sources]
    if not any(run) and (data or generate or layerwise):
        raise UsageError(
            f"{model} is a trace, and --data, --generate and --layerwise are about running a model.",
            "",
            "Leave them out, or give the model.",
        )
    if (mask or weights) and not run[0]:
        raise UsageError(f"{model} is a trace.", "--mask and --weights need a model.", "Give the model first.")
    facts = {"num_experts": num_experts, "top_k": top_k, "layers": layers}
    if any(run) and any(fact is not None for fact in facts.values()):
        raise UsageError("--num-experts, --top-k and --layers are for traces.", "A model knows.", "Leave them out.")
    text = tuple(data or BUILTIN)
    if any(run) and not data:
        output.note(f"Without --data the text is {', '.join(BUILTIN)}.", quiet=quiet)
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sequence_length": seq_len,
        "trace_bytes": most,
        "generate": generate,
        "layerwise": layerwise,
        "device": device,
        "dtype": dtype,
        "experts_implementation": experts_implementation,
        "seed": seed,
    }
    masks = _masks(mask)
    studies = [
        _recorded(source, text, settings, revision, quiet) if runs else _read(source, format, facts)
        for source, runs in zip(sources, run, strict=True)
    ]
    if not studies[0].recordings:
        return  # this process of torchrun is not the one that tells
    losses = _losses(studies[0], text, masks, settings, quiet) if masks else None
    similar = _alike(studies[0], quiet) if weights else []
    found = report(studies, losses=losses, weights=similar, adjacent=olmoe_compat, seed=seed)
    files = _keep(found, studies[0], html, trace, tokenizer, overwrite)
    _show(found, files, json=json, quiet=quiet, by_number=fixed_order)
    failed = [line for condition in conditions for line in gate.failures(condition, found.rows)]
    if failed:
        shown = "; ".join(failed[:5]) + (f"; and {len(failed) - 5} more" if len(failed) > 5 else "")
        raise CheckFailed(f"{shown}.", "--fail-on says so.", "Look at the table, or change the condition.")


def _masks(texts: list[str] | None) -> list[Mask]:
    if not texts:
        return []
    from moectl.routing.masks import parse

    return [parse(text) for text in texts]


def _recorded(source: str, data: tuple[str, ...], settings: dict[str, Any], revision: str | None, quiet: bool) -> Study:
    """Run a model."""
    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output
    from moectl.routing.run import Settings, record
    from moectl.routing.study import Study

    checkpoint = Checkpoint.open(source, revision)
    with output.progress("reading", settings["max_tokens"], quiet=quiet, unit="tokens") as advance:
        recordings = record(
            checkpoint, data, Settings(**settings), lambda text: output.note(text, quiet=quiet), advance
        )
    return Study(checkpoint.name, recordings, checkpoint)


def _read(source: str, format: str | None, facts: dict[str, int | None]) -> Study:
    """Read a trace."""
    from moectl.routing.ingest.formats import read
    from moectl.routing.study import Study

    path = Path(source).expanduser()
    return Study(path.resolve().name, read(path, format, **facts))


def _losses(study: Study, data: tuple[str, ...], masks: list[Mask], settings: dict[str, Any], quiet: bool) -> Losses:
    """Run the model again with masks."""
    from moectl.report import output
    from moectl.routing.rerun import masked_losses
    from moectl.routing.run import Settings

    assert study.checkpoint is not None
    trace = next(iter(study.recordings.values())).trace
    return masked_losses(
        study.checkpoint, data, masks, Settings(**settings), trace, lambda text: output.note(text, quiet=quiet)
    )


def _alike(study: Study, quiet: bool) -> list[Alike]:
    """Compare the experts' weights."""
    from moectl.report import output
    from moectl.routing.weights import alike

    assert study.checkpoint is not None
    layers = len(next(iter(study.recordings.values())).statistics.loads)
    with output.progress("comparing weights", layers, quiet=quiet, unit="layers") as advance:
        return alike(study.checkpoint, advance)


def _require_places(trace: Path | None, html: Path | None, overwrite: bool) -> None:
    """Refuse places that could not be written after all the work."""
    from moectl.traces.store import require_place

    if trace is not None:
        require_place(trace, overwrite=overwrite)
    writing.check_page(html)


def _keep(
    found: Report, study: Study, html: Path | None, trace: Path | None, tokenizer: str | None, overwrite: bool
) -> list[Path]:
    """Write what was asked for."""
    from moectl.report import html as pages
    from moectl.routing.page.render import render
    from moectl.traces.store import save

    if trace is not None:
        save(study.recordings, trace, overwrite=overwrite)
    if html is not None:
        pages.write(html, render(found, _speller(study, tokenizer), _command()))
    return [path for path in (trace, html) if path is not None]


def _speller(study: Study, tokenizer: str | None) -> Spell | None:
    """What makes text of the study's token ids: its own tokenizer, or that of a model that is named."""
    from functools import partial

    from moectl.checkpoint.source import Checkpoint
    from moectl.layerwise.tokenizer import load_tokenizer
    from moectl.routing.spelling import pieces

    checkpoint = study.checkpoint if tokenizer is None else Checkpoint.open(tokenizer)
    return None if checkpoint is None else partial(pieces, load_tokenizer(checkpoint))


def _show(found: Report, files: list[Path], *, json: bool, quiet: bool, by_number: bool) -> None:
    """The result on stdout, words and pictures on stderr."""
    import shutil

    from moectl.report import output
    from moectl.routing import terminal
    from moectl.routing.report import SCHEMA

    width = max(40, min(shutil.get_terminal_size().columns, 140))
    if json:
        document: dict[str, Any] = {"command": _command(), "files": [str(path) for path in files], **found.to_json()}
        output.emit_json(SCHEMA, document)
    elif sys.stdout.isatty():
        output.emit_table(*terminal.table(found.analysis, sys.stdout.encoding), terminal.TITLE)
    else:
        output.emit_table(*terminal.full(found))
    sys.stdout.flush()
    for warning in found.warnings:
        output.warn(warning)
    if quiet:
        return
    terminal.print_strip(found.analysis, sys.stderr, width, by_number=by_number)
    for line in terminal.words(found, width):
        output.note(line)
    for path in files:
        output.note(f"Written: {path}")
    output.note(f"Again: {_command()}")


def _command() -> str:
    import shlex

    return shlex.join(["moectl", *sys.argv[1:]])
