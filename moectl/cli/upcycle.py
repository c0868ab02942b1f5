"""`moectl upcycle`: dense checkpoints become a Mixture-of-Experts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli import options

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan

app = typer.Typer(
    help="Turn dense checkpoints into a Mixture-of-Experts checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def upcycle() -> None:
    """Turn dense checkpoints into a Mixture-of-Experts checkpoint."""


@app.command("sparse")
def sparse(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="Directory, Hub id or hf://org/name@rev.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts each token is sent to.")] = 2,
    into: Annotated[str | None, typer.Option(help="MoE family to write; the family's default when left out.")] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the normal router weights.")] = 0.02,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of normal noise added to every expert weight; 0 is exact.")
    ] = 0.0,
    aux_loss_coef: Annotated[float, typer.Option(help="Load-balancing loss coefficient in the config.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="auto (as the source), bfloat16, float16 or float32.")] = "auto",
    seed: options.Seed = 0,
    shard_size: Annotated[str, typer.Option(help="Largest shard: bytes, or with kB, MB, GB, TB.")] = "5GB",
    revision: options.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a dense model's FFN into E experts per layer and add a router (sparse upcycling, arXiv 2212.05055).

    The result computes the same function as DENSE (with --noise 0), loads in transformers and vLLM, and is
    written at disk speed in constant memory. stdout is the path of OUT. The same command resumes after an
    interruption.
    """
    from time import perf_counter

    from moectl.checkpoint.source import Checkpoint
    from moectl.checkpoint.writer import check_target, write
    from moectl.report import output
    from moectl.upcycle.sparse import SparseRecipe, plan_sparse

    started = perf_counter()
    recipe = SparseRecipe(
        experts=experts,
        top_k=top_k,
        into=into,
        router_std=router_std,
        noise=noise,
        aux_loss_coef=aux_loss_coef,
        dtype=dtype,
        seed=seed,
        shard_bytes=output.parse_size(shard_size),
    )
    recipe.check()
    source = Checkpoint.open(dense, revision)
    for warning in source.warnings:
        output.warn(warning)
    plan = plan_sparse(source, recipe)
    check_target(plan, out, overwrite=overwrite or dry_run)
    if dry_run:
        show_plan(plan, out, json)
        return
    facts = plan.facts
    output.note(
        f"{source.name} ({facts['source_family']}, {output.count(facts['source_parameters'])}) -> {facts['family']}, "
        f"{experts} experts, top {top_k}: {output.size(plan.file_bytes)} in {len(plan.shards)} file(s)",
        quiet=quiet,
    )
    with output.progress("writing", plan.nbytes, quiet=quiet) as on_bytes:
        written = write(plan, out, overwrite=overwrite, on_bytes=on_bytes)
    seconds = perf_counter() - started
    shown = str(out)
    if json:
        output.emit_json(
            "moectl.upcycle/1",
            {
                "path": shown,
                "already_complete": written.shards_written == 0,
                "bytes": plan.file_bytes,
                "tensors": len(plan.tensors),
                "fingerprint": plan.fingerprint,
                "seconds": seconds,
                "recipe": plan.recipe,
                **facts,
            },
        )
    else:
        output.emit_path(out)
    state = f"written in {seconds:.1f} s" if written.shards_written else "was already complete"
    output.note(
        f"{output.count(facts['parameters'])} parameters, {output.count(facts['active_parameters'])} active, {state}.\n"
        f"Next: moectl verify {shlex.quote(shown)} --against {shlex.quote(dense)}",
        quiet=quiet,
    )


def show_plan(plan: Plan, out: Path, json: bool) -> None:
    """Print what would be written: the whole plan as JSON, or its sizes as a table."""
    from moectl.checkpoint.writer import free_bytes
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
