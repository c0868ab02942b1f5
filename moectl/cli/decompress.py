"""`moectl decompress`: a checkpoint with coded experts made an ordinary one."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options, writing
from moectl.cli.groups import grouped
from moectl.cli.opening import opened


@grouped
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
    *,
    how: writing.Writing,
) -> None:
    """Decode MODEL, which `moectl compress qmoe` made, to an ordinary checkpoint that computes the same.

    Its tensors have the names and shapes that checkpoints of its family have, so it loads wherever these do. One layer
    is decoded at a time, into the shards it belongs to: the disk has to hold nothing but the output. The same command
    resumes after an interruption.
    """
    from moectl.checkpoint.publish import check_apart
    from moectl.compress.decoding import Decoding
    from moectl.compress.decompress import check_dtype, plan_decompress
    from moectl.report import output

    shard_bytes = output.parse_size(shard_size)
    check_dtype(dtype)
    source = opened(model, revision)
    check_apart(out, source.path)
    plan = plan_decompress(Decoding.of(source, export), dtype, shard_bytes)
    writing.carry_out(
        plan, out, how, headline=f"{source.name} -> {export or 'plain weights'}", schema="moectl.decompress/1"
    )
