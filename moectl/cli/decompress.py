"""`moectl decompress`: a checkpoint with coded experts made an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli import options, writing


def decompress(
    model: options.Model,
    out: writing.Out,
    dtype: writing.Dtype = "auto",
    export: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="w2a16 or w4a16: repack experts for vLLM and compressed-tensors rather than decode them; their levels "
            "have to be symmetric.",
            show_default=False,
        ),
    ] = None,
    shard_size: writing.ShardSize = "5GB",
    revision: options.Revision = None,
    push_to_hub: writing.PushToHub = None,
    dry_run: writing.DryRun = False,
    overwrite: writing.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decode MODEL, which `moectl compress qmoe` made, to an ordinary checkpoint that computes the same.

    Its tensors have the names and shapes that checkpoints of its family have, so it loads wherever these do. One layer
    is decoded at a time, into OUT.statistics, where the same command resumes; that is removed when OUT is complete.
    """
    from shutil import rmtree
    from time import perf_counter

    from moectl.checkpoint.publish import check_apart, exists_error, is_occupied
    from moectl.checkpoint.source import Checkpoint
    from moectl.compress import decompress as work
    from moectl.compress.decoding import Decoding
    from moectl.report import output

    how = writing.Writing(
        out=out,
        push_to_hub=push_to_hub,
        worker=None,
        allow_nonfinite=False,
        dry_run=dry_run,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
        started=perf_counter(),
    )
    shard_bytes = output.parse_size(shard_size)
    work.check_dtype(dtype)
    how.check()
    source = Checkpoint.open(model, revision)
    for warning in source.warnings:
        output.warn(warning)
    check_apart(out, source.path)
    decoding = Decoding.of(source, export)
    with writing.statistics(out, dry_run=dry_run) as place:
        plan = work.plan_decompress(decoding, work.imagined_files(decoding, place), dtype, shard_bytes)
        if not dry_run:
            if is_occupied(out) and not overwrite:
                if not work.is_made(out, plan):
                    raise exists_error(out)
                _already_made(out, json=json, quiet=quiet)
                return
            work.check_space(plan, out)
            with output.progress("decoding", len(decoding.layers), quiet=quiet, unit="layers") as on_layers:
                files = work.layer_files(decoding, place, lambda _layer: on_layers(1))
            plan = work.plan_decompress(decoding, files, dtype, shard_bytes)
        writing.carry_out(
            plan, how, headline=f"{source.name} -> {export or 'plain weights'}", schema="moectl.decompress/1"
        )
        if not dry_run:
            rmtree(place, ignore_errors=True)


def _already_made(out: Path, *, json: bool, quiet: bool) -> None:
    from moectl.report import output

    if json:
        output.emit_json("moectl.decompress/1", {"path": str(out), "published": True, "already_complete": True})
    else:
        output.emit_path(out)
    output.note("It was already complete.", quiet=quiet)
