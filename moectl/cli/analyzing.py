"""What `moectl analyze-routing` does with its options: run or read, ask, keep, show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moectl.routing.answers import Asked
    from moectl.routing.masking import Mask
    from moectl.routing.report import Report
    from moectl.routing.rerun import Losses
    from moectl.routing.spelling import Spell
    from moectl.routing.study import Study
    from moectl.routing.weights import Alike


def masks(texts: list[str] | None) -> list[Mask]:
    """What `--mask` says."""
    if not texts:
        return []
    from moectl.routing.masks import parse

    return [parse(text) for text in texts]


def recorded(source: str, data: tuple[str, ...], settings: dict[str, Any], revision: str | None, quiet: bool) -> Study:
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


def opened(source: str, format: str | None, facts: dict[str, int | None]) -> Study:
    """Read a trace."""
    from moectl.routing.ingest.formats import read
    from moectl.routing.study import Study

    path = Path(source).expanduser()
    return Study(path.resolve().name, read(path, format, **facts))


def masked(study: Study, data: tuple[str, ...], masks: list[Mask], settings: dict[str, Any], quiet: bool) -> Losses:
    """Run the model again with masks."""
    from moectl.report import output
    from moectl.routing.rerun import masked_losses
    from moectl.routing.run import Settings

    assert study.checkpoint is not None
    trace = next(iter(study.recordings.values())).trace
    return masked_losses(
        study.checkpoint, data, masks, Settings(**settings), trace, lambda text: output.note(text, quiet=quiet)
    )


def alike(study: Study, quiet: bool) -> list[Alike]:
    """Compare the experts' weights."""
    from moectl.report import output
    from moectl.routing.weights import alike

    assert study.checkpoint is not None
    layers = len(next(iter(study.recordings.values())).statistics.loads)
    with output.progress("comparing weights", layers, quiet=quiet, unit="layers") as advance:
        return alike(study.checkpoint, advance)


def require_places(trace: Path | None, placement: Path | None, engine: str, overwrite: bool) -> None:
    """Refuse places that could not be written after all the work."""
    from moectl.routing.placement import export
    from moectl.traces.store import require_place

    if trace is not None:
        require_place(trace, overwrite=overwrite)
    if placement is not None:
        export.require_place(placement, engine, overwrite=overwrite)


def asked(
    replay: str | None, what_if: list[str], machine: dict[str, Any], placement: dict[str, Any] | None, *, advise: bool
) -> Asked:
    """What `--replay`, `--what-if`, `--advise` and `--placement` say; nothing of it is imported where they do not."""
    from moectl.routing.answers import Asked, PlacementFile, parse

    if not (replay or what_if or placement or advise):
        return Asked()
    from moectl.routing.whatif.machine import Machine, parse_link

    known = Machine(link_gb_per_s=parse_link(machine.pop("link")), **machine)
    return parse(replay, what_if, known, PlacementFile(**placement) if placement else None, advise=advise)


def answered(found: Report, study: Study, asked: Asked, seed: int, quiet: bool) -> Report:
    """The report with the answers."""
    from dataclasses import replace

    from moectl.report import output
    from moectl.routing.answers import answer

    if not asked:
        return found
    findings, advice = answer(study, asked, seed, lambda text: output.note(text, quiet=quiet))
    return replace(found, findings=findings, advice=advice)


def keep(
    found: Report, study: Study, html: Path | None, trace: Path | None, tokenizer: str | None, overwrite: bool
) -> list[Path]:
    """Write what was asked for."""
    from moectl.report import html as pages
    from moectl.routing.page.render import render
    from moectl.traces.store import save

    if trace is not None:
        save(study.recordings, trace, overwrite=overwrite)
    if html is not None:
        pages.write(html, render(found, speller(study, tokenizer), command()))
    return [path for path in (trace, html) if path is not None]


def speller(study: Study, tokenizer: str | None) -> Spell | None:
    """What makes text of the study's token ids: its own tokenizer, or that of a model that is named."""
    from functools import partial

    from moectl.checkpoint.source import Checkpoint
    from moectl.layerwise.tokenizer import load_tokenizer
    from moectl.routing.spelling import pieces

    checkpoint = study.checkpoint if tokenizer is None else Checkpoint.open(tokenizer)
    return None if checkpoint is None else partial(pieces, load_tokenizer(checkpoint))


def show(found: Report, files: list[Path], *, json: bool, quiet: bool, by_number: bool) -> None:
    """The result on stdout, words and pictures on stderr."""
    import shutil

    from moectl.report import output
    from moectl.routing import answers, terminal
    from moectl.routing.report import SCHEMA

    width = max(40, min(shutil.get_terminal_size().columns, 140))
    if json:
        document: dict[str, Any] = {"command": command(), "files": [str(path) for path in files], **found.to_json()}
        output.emit_json(SCHEMA, document)
    elif found.answered:
        tables = list(answers.tables(found))
        for number, (title, columns, rows) in enumerate(tables):
            if number:
                sys.stdout.write("\n")
            if len(tables) > 1 and not sys.stdout.isatty():
                sys.stdout.write(f"# {title}\n")
            output.emit_table(columns, rows, title)
    elif sys.stdout.isatty():
        output.emit_table(*terminal.table(found.analysis, sys.stdout.encoding), terminal.TITLE)
    else:
        output.emit_table(*terminal.full(found))
    sys.stdout.flush()
    for warning in found.warnings:
        output.warn(warning)
    if quiet:
        return
    if found.answered:
        lines = answers.words(found, width)
    else:
        terminal.print_strip(found.analysis, sys.stderr, width, by_number=by_number)
        lines = terminal.words(found, width)
    for line in lines:
        output.note(line)
    for path in files:
        output.note(f"Written: {path}")
    output.note(f"Again: {command()}")


def command() -> str:
    """What was typed."""
    import shlex

    return shlex.join(["moectl", *sys.argv[1:]])
