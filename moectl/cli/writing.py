"""What every command does with a plan: show it, or write it, and say how it went."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import checks, options

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan
    from moectl.checkpoint.publish import Written
    from moectl.checkpoint.source import Checkpoint
    from moectl.checkpoint.workers import Worker

Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to make.", callback=checks.place)]
Dtype = Annotated[str, typer.Option(help="auto (as the source), bfloat16, float16 or float32.")]
ShardSize = Annotated[str, typer.Option(help="Largest shard: bytes, or with kB, MB, GB, TB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@dataclass(frozen=True, slots=True)
class Writing:
    """How a plan is to be written: the options that all commands which make a checkpoint share.

    Raises:
        UsageError: a worker that is neither K/N nor auto with a launcher's variables, or no repository id.
    """

    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="Also upload OUT to this Hub repository.", show_default=False)
    ] = None
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="K/N|auto",
            help="Write the K-th of N shares of the shards; auto asks torchrun's or Slurm's variables.",
            show_default=False,
        ),
    ] = None
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Copy tensors that hold NaN or infinity all the same.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False
    overwrite: Overwrite = False
    json: options.Json = False
    quiet: options.Quiet = False
    started: float = field(default_factory=perf_counter, init=False)

    def __post_init__(self) -> None:
        from moectl.checkpoint import hub

        self.share()
        if self.push_to_hub is not None:
            hub.check_repo_id(self.push_to_hub)

    def share(self) -> Worker | None:
        """The shards this process is to write, where that is not all of them."""
        import os

        from moectl.checkpoint.workers import parse_worker

        return None if self.worker is None else parse_worker(self.worker, os.environ)


@dataclass(frozen=True, slots=True)
class WritingAlone(Writing):
    """The same of a command that computes what it writes: it has no workers, and copies no tensor that holds NaN."""

    worker: None = field(default=None, init=False)
    allow_nonfinite: bool = field(default=False, init=False)


def carry_out(
    plan: Plan,
    out: Path,
    how: Writing,
    *,
    headline: str,
    against: Sequence[str] = (),
    then: str = "",
    schema: str = "moectl.upcycle/1",
    measure: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Show the plan (--dry-run) or write it, publish it, and report on stdout and stderr as the contract says.

    `headline` says what becomes of what. `against` are the sources that `moectl verify --against` can compare with.
    `then` is the next thing worth doing where that is not `moectl verify`. `measure` looks at the published output, and
    what it gives goes into the JSON of that `schema`.

    Raises:
        MoectlError: as `write`, `check_target` and `hub.upload` raise it.
    """
    from moectl.checkpoint import hub
    from moectl.checkpoint.publish import is_occupied
    from moectl.checkpoint.writer import check_target, write
    from moectl.report import output

    quiet, share = how.quiet, how.share()
    check_target(plan, out, overwrite=how.overwrite or how.dry_run, worker=None if how.dry_run else share)
    if how.dry_run:
        show_plan(plan, out, how.json)
        return
    facts = plan.facts
    output.note(f"{headline}: {output.size(plan.file_bytes)} in {len(plan.shards)} file(s)", quiet=quiet)
    total = sum(shard.nbytes for shard in (share.share(plan.shards) if share else plan.shards))
    checking = is_occupied(out) and not how.overwrite
    if checking:
        say_checking(out, quiet=quiet)
    with output.progress("checking" if checking else "writing", total, quiet=quiet) as on_bytes:
        written = write(
            plan,
            out,
            overwrite=how.overwrite,
            worker=share,
            allow_nonfinite=how.allow_nonfinite,
            command=whole_command(sys.argv),
            on_bytes=on_bytes,
        )
    seconds = perf_counter() - how.started
    if not written.published:
        show_unpublished(written, how.worker, len(plan.shards), how.json)
        return
    uploaded = hub.upload(out, how.push_to_hub) if how.push_to_hub is not None else None
    measured = measure()
    if how.json:
        output.emit_json(
            schema,
            {
                "path": str(out),
                "published": True,
                "already_complete": written.shards_written == 0,
                "bytes": plan.file_bytes,
                "tensors": len(plan.tensors),
                "fingerprint": plan.fingerprint,
                "seconds": seconds,
                "uploaded": uploaded,
                "recipe": plan.recipe,
                **facts,
                **measured,
            },
        )
    else:
        output.emit_path(out)
    if uploaded:
        output.note(f"Uploaded: {uploaded}", quiet=quiet)
    state = f"written in {seconds:.1f} s" if written.shards_written else "was already complete"
    working = facts["active_parameters"]  # None under routers that let tokens decide
    active = "" if working is None else f", {output.count(working)} active"
    compare = "".join(f" --against {shlex.quote(name)}" for name in against)
    output.note(
        f"{output.count(facts['parameters'])} parameters{active}, {state}.\n"
        f"Next: {then or f'moectl verify {shlex.quote(str(out))}{compare}'}",
        quiet=quiet,
    )


def say_checking(out: Path, *, quiet: bool) -> None:
    """Say on stderr why a command that has nothing to write takes a while."""
    from moectl.report import output

    output.note(f"{out} exists: checking its tensors.", quiet=quiet)


@contextmanager
def statistics(out: Path, sources: Iterable[Checkpoint], *, dry_run: bool) -> Iterator[Path]:
    """Where statistics are kept: beside the output, or nowhere for longer than a dry run takes.

    Raises:
        UsageError: that would be in a source, or a source in the output.
    """
    from tempfile import TemporaryDirectory

    from moectl.checkpoint.publish import check_apart

    for source in sources:
        check_apart(out, source.path)
    if dry_run:
        with TemporaryDirectory() as place:
            yield Path(place)
    else:
        yield statistics_of(out)


def statistics_of(out: Path) -> Path:
    """Where statistics of an output are kept."""
    out = out if out.name else out.absolute()  # as of "."
    return out.with_name(f"{out.name}.statistics")


def whole_command(argv: list[str]) -> str:
    """The command line without its --worker: what writes everything that is missing."""
    words = iter(argv[1:])
    kept = []
    for word in words:
        if word == "--worker":
            next(words, None)
        elif not word.startswith("--worker="):
            kept.append(word)
    return shlex.join(["moectl", *kept])


def show_unpublished(written: Written, worker: str | None, shards: int, json: bool) -> None:
    """Say, even in quiet mode, that others have to end before there is an output."""
    from moectl.report import output

    if json:
        missing = list(written.missing)
        output.emit_json("moectl.worker/1", {"path": str(written.path), "published": False, "missing": missing})
    output.note(
        f"Worker {worker} is done: {written.shards_written} shard(s) written, {len(written.missing)} of {shards} "
        f"still missing. The last worker publishes {written.path}.\n"
        f"Next, if none does: moectl finish {shlex.quote(str(written.path))}"
    )


def show_plan(plan: Plan, out: Path, json: bool) -> None:
    """Print what would be written: the whole plan as JSON, or its sizes as a table."""
    from moectl.checkpoint.fs import free_bytes
    from moectl.report import output

    free = free_bytes(out.absolute())
    files = [{"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards]
    facts = {"bytes": plan.file_bytes, "free_bytes": free, "fingerprint": plan.fingerprint, **plan.facts}
    if json:
        output.emit_json("moectl.plan/1", {"path": str(out), "files": files, **facts, "plan": plan.to_json()})
        return
    copied = sum(tensor.nbytes for tensor in plan.tensors if plan.is_copied(tensor))
    rows: list[tuple[str, output.Cell]] = [
        ("output", str(out)),
        ("family", f"{plan.facts['source_family']} -> {plan.facts['family']}"),
        ("parameters", plan.facts["parameters"]),
        ("active parameters", plan.facts["active_parameters"]),
        ("files", len(files)),
        ("tensors", len(plan.tensors)),
        ("bytes", plan.file_bytes),
        ("bytes copied", copied),
        ("bytes computed", plan.nbytes - copied),
        ("bytes free on disk", free),
        ("fingerprint", plan.fingerprint),
    ]
    output.emit_table(("what", "value"), rows, title="Plan")
    if plan.file_bytes > free:
        output.warn("The disk is too small for this.")
