"""`moectl finish`: publish what workers left beside each other."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli import options

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan


def finish(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What the workers were given as -o.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Publish OUT when every worker's shards are there, after checking each by its hash.

    stdout is the path of OUT. Shards that are missing or damaged are named, with the command that writes them, and
    the exit code is 3. An OUT that is already published is fine.
    """
    from moectl.checkpoint import publish
    from moectl.report import output

    with ExitStack() as stack:

        def on_plan(plan: Plan) -> Callable[[int], None]:
            return stack.enter_context(output.progress("checking", plan.file_bytes, quiet=quiet))

        written = publish.finish(out, on_plan=on_plan)
    if json:
        output.emit_json("moectl.finish/1", {"path": str(out), "published": written.published})
    else:
        output.emit_path(out)
    output.note(f"Published.\nNext: moectl verify {shlex.quote(str(out))}", quiet=quiet)
