"""`moectl train`: continued training of a checkpoint or an adapter, on one CPU or many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli import options, training, writing
from moectl.cli.groups import grouped

if TYPE_CHECKING:
    from moectl.training.preview import Preview


@grouped
def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory, Hub id or hf://org/name@rev, of a model or an adapter.")
    ],
    out: writing.Out,
    data: training.Data,
    *,
    steps: training.Steps,
    router_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the routers; --lr when left out.", show_default=False)
    ] = None,
    schedule: training.Schedule,
    only: Annotated[
        str | None,
        typer.Option(
            help="What is trained: all, router, experts, attention+router, or adapters, which an adapter's default is.",
            show_default=False,
        ),
    ] = None,
    freeze_experts: Annotated[bool, typer.Option("--freeze-experts", help="Leave the routed experts alone.")] = False,
    aux_loss: Annotated[
        float | None,
        typer.Option(
            help="Coefficient of each layer's balancing loss: 0.01, or 0 where --router brings its own; 0 is off.",
            show_default=False,
        ),
    ] = None,
    z_loss: Annotated[float, typer.Option(help="Coefficient of each layer's router z-loss; 0 is off.")] = 0.0,
    bias_update: Annotated[
        float, typer.Option(help="Step of the selection biases, in families that have them; 0 is off.")
    ] = 0.0,
    router: training.Router = None,
    dtype: training.Compute = "float32",
    experts_implementation: Annotated[
        str | None,
        typer.Option(help="transformers' name of one, or moectl, the default on a GPU.", show_default=False),
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(help="Processes the experts of a layer are spread over; tokens are sent to them.")
    ] = 1,
    save_every: training.SaveEvery = 100,
    keep: training.Keep = 2,
    metrics: Annotated[
        Path | None,
        typer.Option(help="Where to write the steps; OUT/train/metrics.jsonl when left out.", show_default=False),
    ] = None,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Show the steps in tensorboard or wandb too (needs moectl[log]); repeatable.", show_default=False
        ),
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and what that takes; write nothing.")
    ] = False,
    overwrite: writing.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a checkpoint further, dense or Mixture-of-Experts, and write an ordinary checkpoint.

    MODEL may be a PEFT adapter, of LoRA or of moectl upcycle pesc: the model it names is frozen, and OUT is an adapter.
    One process needs no launcher; under torchrun the model is sharded over all of them (FSDP2) and the data stays the
    same. stdout is the path of OUT.

    With --router the MoE layers are routed by another router, with the losses of its paper. What no class of
    transformers can hold is saved as a research checkpoint, which moectl alone loads. An encoder-decoder is trained to
    fill in spans of its text.

    SIGTERM saves and exits with 143. The same command resumes from the last checkpoint, whatever ended it, and gives
    the parameters of an undisturbed run, bit for bit in float32 with as many processes as before.
    """
    from dataclasses import asdict, replace

    from moectl.report import output
    from moectl.training.adapters import Adapter, open_source
    from moectl.training.checks import check
    from moectl.training.preview import preview
    from moectl.training.recipe import TrainRecipe
    from moectl.training.world import joined

    recipe = TrainRecipe(
        data=tuple(data),
        **asdict(steps),
        router_rate=router_lr,
        **asdict(schedule),
        only=only or "all",
        freeze_experts=freeze_experts,
        aux_loss=aux_loss,
        z_loss=z_loss,
        bias_update=bias_update,
        router=router,
        dtype=dtype,
        implementation=experts_implementation,
        seed=seed,
    )
    with joined(device) as world:
        with world.agreed():
            recipe.check()
            source = open_source(model, revision)
        is_adapter = isinstance(source, Adapter)
        training.caution(router)
        if is_adapter and only is None:
            recipe = replace(recipe, only="adapters")
        if dry_run:
            with world.agreed():
                check(source, recipe, world.size, expert_parallel=expert_parallel, log_to=log_to or ())
                planned = preview(source, recipe, out, world, keep=keep, overwrite=overwrite)
            if world.is_main:
                _show(planned, out, json)
            return
        outcome = training.train_shown(
            source,
            recipe,
            out,
            world,
            save_every=save_every,
            keep=keep,
            metrics=metrics,
            log_to=log_to or (),
            overwrite=overwrite,
            expert_parallel=expert_parallel,
            quiet=quiet,
            title="training",
        )
    if world.is_main and outcome.signal is None:
        if json:
            output.emit_json("moectl.train/1", training.document(outcome, out))
        else:
            output.emit_path(out)
        output.note(training.ended(outcome, out, is_adapter=is_adapter), quiet=quiet)
    training.end_if_stopped(outcome)


def _show(preview: Preview, out: Path, json: bool) -> None:
    """Print what would be trained: one document, or a table."""
    from dataclasses import asdict

    from moectl.report import output

    if json:
        domains = [{"domain": domain, "weight": weight} for domain, weight in preview.data]
        output.emit_json("moectl.train.plan/1", {"path": str(out), **asdict(preview), "data": domains})
        return
    begin = f"after step {preview.resumed_from}" if preview.resumed_from else "at the beginning"
    rows: list[tuple[str, output.Cell]] = [
        ("output", str(out)),
        ("begins", "is already complete" if preview.complete else begin),
        ("parameters", preview.parameters),
        ("parameters trained", preview.trained),
        ("MoE layers", preview.moe_layers),
        ("steps", preview.steps),
        ("tokens", preview.tokens),
        ("tokens per step", preview.tokens_per_step),
        *((f"data: {domain}", f"{weight:.1%}") for domain, weight in preview.data),
        ("bytes of the output", preview.output_bytes),
        ("bytes of weights, per process", preview.weight_bytes),
        ("bytes of gradients, per process", preview.gradient_bytes),
        ("bytes of the optimiser, per process", preview.optimizer_bytes),
        ("bytes of a checkpoint", preview.checkpoint_bytes),
        ("bytes written at most", preview.disk_bytes),
        ("bytes free on disk", preview.free_bytes),
        ("fingerprint", preview.fingerprint),
    ]
    output.emit_table(("what", "value"), rows, title="Training")
    if preview.disk_bytes > preview.free_bytes:
        output.warn("The disk is too small for this.")
