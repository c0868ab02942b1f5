"""What `moectl train` and `moectl branch` share: the options of a training, and how it is told of."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.launched import rank_and_size

if TYPE_CHECKING:
    from moectl.training.adapters import Source
    from moectl.training.recipe import TrainRecipe
    from moectl.training.run import Facts, Outcome
    from moectl.training.world import World

Data = Annotated[
    list[str], typer.Option(metavar="SPEC[:WEIGHT]", help="A file, directory, Hub dataset or builtin:NAME; repeatable.")
]
Compute = Annotated[str, typer.Option(help="float32, or bfloat16 for autocast; weights are trained in float32.")]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,...]",
        help="Route MoE layers by another router: moectl routers lists them.",
        show_default=False,
    ),
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints that are kept while training.")]


@dataclass(frozen=True, slots=True)
class Steps:
    """What a step is and how many there are, as `TrainRecipe` names it."""

    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 16
    sequence_length: Annotated[int, typer.Option("--seq-len", help="Tokens per packed sequence.")] = 512
    accumulate: Annotated[int, typer.Option(help="Micro-batches each step is computed in.")] = 1
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-4


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the learning rate changes, and what holds the weights back, as `TrainRecipe` names it."""

    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warm-up.")] = "cosine"
    warmup: Annotated[int, typer.Option(help="Steps until the peak.")] = 0
    min_rate: Annotated[float, typer.Option("--min-lr", help="Where the cosine ends, as a share of the peak.")] = 0.1
    weight_decay: Annotated[float, typer.Option(help="AdamW's decay of matrices.")] = 0.1
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0


def caution(router: str | None) -> None:
    """Warn of what has to be known of a router that was asked for."""
    if router is not None and rank_and_size()[0] == 0:
        from moectl.layerwise.routed import cautions, one_router
        from moectl.report import output

        for words in cautions(one_router(router).entry):
            output.warn(words)


def train_shown(
    source: Source, recipe: TrainRecipe, out: Path, world: World, *, quiet: bool, title: str, **how: Any
) -> Outcome:
    """Train with the line on the terminal, which begins when the facts are known."""
    from contextlib import ExitStack

    from moectl.report import output
    from moectl.training.live import live
    from moectl.training.run import Reporting, train

    shown: list[Any] = []
    with ExitStack() as stack:

        def begun(facts: Facts) -> None:
            output.note(_begun(facts, recipe, world.size), quiet=quiet)
            shown.append(stack.enter_context(live(title, recipe.steps, facts.resumed_from, quiet=quiet)))

        reporting = Reporting(begun, lambda metrics: shown[0](metrics))
        return train(source, recipe, out, world, reporting=reporting, **how)


def _begun(facts: Facts, recipe: TrainRecipe, processes: int) -> str:
    from moectl.report import output

    layers = f", {facts.moe_layers} MoE layers" if facts.moe_layers else ""
    resumed = f", resumed after step {facts.resumed_from}" if facts.resumed_from else ""
    return (
        f"{output.count(facts.trained)} of {output.count(facts.parameters)} parameters{layers}, "
        f"{recipe.steps} steps of {recipe.batch_size} x {recipe.sequence_length} tokens on {processes} process(es)"
        f"{resumed}"
    )


def document(outcome: Outcome, out: Path) -> dict[str, Any]:
    """The end of a training for `--json`."""
    from dataclasses import asdict

    last = asdict(outcome.last) if outcome.last else None
    return {
        "path": str(out),
        "step": outcome.step,
        "already_complete": outcome.already,
        "seconds": outcome.seconds,
        "last": last,
    }


def ended(outcome: Outcome, out: Path, *, is_adapter: bool = False) -> str:
    """The end of a training in words, and what to do next."""
    import shlex

    last = outcome.last
    how = f"loss {last.loss:.4f} at step {last.step}, " if last else ""
    state = "was already complete" if outcome.already else f"{how}{outcome.seconds:.1f} s"
    adapter = f"PeftModel.from_pretrained(model, {str(out)!r}); docs/pesc.md says more"
    return f"{state}.\nNext: {adapter if is_adapter else f'moectl inspect {shlex.quote(str(out))}'}"


def end_if_stopped(outcome: Outcome) -> None:
    """End as a program does that a signal stopped, if one did."""
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.signal is not None:
        raise SystemExit(128 + outcome.signal)
