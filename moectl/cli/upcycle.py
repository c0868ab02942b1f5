"""`moectl upcycle`: dense checkpoints become a Mixture-of-Experts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli import options

if TYPE_CHECKING:
    from moectl.checkpoint.plan import Plan
    from moectl.checkpoint.publish import Written

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
    layers: Annotated[str, typer.Option(help="MoE layers: all, every:2, last:6, or 0,3,5.")] = "all",
    granularity: Annotated[int, typer.Option(help="Experts each copy of the FFN is cut into.")] = 1,
    scale: Annotated[
        str, typer.Option(help="What makes up for the cut: auto (exact), updown, down, cbrt or none.")
    ] = "auto",
    shared_experts: Annotated[
        bool, typer.Option("--shared-experts", help="Keep the FFN as an always-active expert too, half and half.")
    ] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Keep the FFN as an always-active expert; routed ones start at zero.")
    ] = False,
    drop: Annotated[float, typer.Option(help="Share of each expert's neurons drawn anew (Drop-Upcycling).")] = 0.0,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Shuffle the neurons of each copy before the cut.")
    ] = False,
    reinit: Annotated[float, typer.Option(help="Share of each expert's weights drawn anew (Qwen2-MoE).")] = 0.0,
    router_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the normal router weights: 0.02 when left out, or 0 where only that is exact.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of normal noise added to every expert weight; 0 is exact.")
    ] = 0.0,
    aux_loss_coef: Annotated[float, typer.Option(help="Load-balancing loss coefficient in the config.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="auto (as the source), bfloat16, float16 or float32.")] = "auto",
    seed: options.Seed = 0,
    shard_size: Annotated[str, typer.Option(help="Largest shard: bytes, or with kB, MB, GB, TB.")] = "5GB",
    revision: options.Revision = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="Also upload OUT to this Hub repository.", show_default=False)
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="K/N|auto",
            help="Write the K-th of N shares of the shards; auto asks torchrun's or Slurm's variables.",
            show_default=False,
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Copy tensors that hold NaN or infinity all the same.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a dense model's FFN into E experts per layer and add a router (sparse upcycling, arXiv 2212.05055).

    The result computes the same function as DENSE (unless --noise, --drop, --reinit or --scale give that up),
    loads in transformers and vLLM, and is written at disk speed in constant memory. stdout is the path of OUT.
    The same command resumes after an interruption.

    Workers share nothing but the disk: the last one publishes, as does moectl finish OUT. One that ends before
    prints nothing on stdout (with --json, a document that says "published": false) and exits with 0.
    """
    import os
    from time import perf_counter

    from moectl.checkpoint import hub
    from moectl.checkpoint.source import Checkpoint
    from moectl.checkpoint.workers import parse_worker
    from moectl.checkpoint.writer import check_target, write
    from moectl.report import output
    from moectl.upcycle.recipe import SparseRecipe
    from moectl.upcycle.sparse import plan_sparse

    started = perf_counter()
    recipe = SparseRecipe(
        experts=experts,
        top_k=top_k,
        into=into,
        layers=layers,
        granularity=granularity,
        scale=scale,
        shared_experts=shared_experts,
        residual=residual,
        drop=drop,
        shuffle=shuffle,
        reinit=reinit,
        router_std=router_std,
        noise=noise,
        aux_loss_coef=aux_loss_coef,
        dtype=dtype,
        seed=seed,
        shard_bytes=output.parse_size(shard_size),
    )
    recipe.check()
    share = None if worker is None else parse_worker(worker, os.environ)
    if push_to_hub is not None:
        hub.check_repo_id(push_to_hub)
    source = Checkpoint.open(dense, revision)
    for warning in source.warnings:
        output.warn(warning)
    plan = plan_sparse(source, recipe)
    check_target(plan, out, overwrite=overwrite or dry_run, worker=None if dry_run else share)
    if dry_run:
        show_plan(plan, out, json)
        return
    facts = plan.facts
    output.note(
        f"{source.name} ({facts['source_family']}, {output.count(facts['source_parameters'])}) -> {facts['family']}, "
        f"{experts} experts, top {top_k}: {output.size(plan.file_bytes)} in {len(plan.shards)} file(s)",
        quiet=quiet,
    )
    total = sum(shard.nbytes for shard in (share.share(plan.shards) if share else plan.shards))
    with output.progress("writing", total, quiet=quiet) as on_bytes:
        written = write(
            plan,
            out,
            overwrite=overwrite,
            worker=share,
            allow_nonfinite=allow_nonfinite,
            command=whole_command(sys.argv),
            on_bytes=on_bytes,
        )
    seconds = perf_counter() - started
    if not written.published:
        show_unpublished(written, worker, len(plan.shards), json)
        return
    uploaded = hub.upload(out, push_to_hub) if push_to_hub is not None else None
    shown = str(out)
    if json:
        output.emit_json(
            "moectl.upcycle/1",
            {
                "path": shown,
                "published": True,
                "already_complete": written.shards_written == 0,
                "bytes": plan.file_bytes,
                "tensors": len(plan.tensors),
                "fingerprint": plan.fingerprint,
                "seconds": seconds,
                "uploaded": uploaded,
                "recipe": plan.recipe,
                **facts,
            },
        )
    else:
        output.emit_path(out)
    if uploaded:
        output.note(f"Uploaded: {uploaded}", quiet=quiet)
    state = f"written in {seconds:.1f} s" if written.shards_written else "was already complete"
    compare = "" if facts["dequantised"] else f" --against {shlex.quote(dense)}"  # transformers may not run the source
    output.note(
        f"{output.count(facts['parameters'])} parameters, {output.count(facts['active_parameters'])} active, {state}.\n"
        f"Next: moectl verify {shlex.quote(shown)}{compare}",
        quiet=quiet,
    )


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
