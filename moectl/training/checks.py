"""What a training is refused for before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.integrations.complete import is_routed
from moectl.layerwise.routed import check_unrouted, replaces_all
from moectl.routers.registry import find
from moectl.training import parameters
from moectl.training.adapters import Adapter, Source
from moectl.training.recipe import TrainRecipe
from moectl.training.trackers import check_trackers


def check(
    source: Source, recipe: TrainRecipe, processes: int, *, expert_parallel: int = 1, log_to: Sequence[str] = ()
) -> None:
    """Refuse what can be seen to be impossible before anything is loaded.

    Raises:
        MachineError: a tracker is not installed.
        UsageError: an option is out of its range, or is not meant for this model.
    """
    recipe.check()
    recipe.check_processes(processes)
    parameters.check_only(recipe.only, has_adapters=isinstance(source, Adapter))
    check_trackers(log_to)
    if expert_parallel > 1 and isinstance(source, Adapter):
        raise UsageError(
            "--expert-parallel is for whole models, and this is an adapter.",
            "Every process holds the adapter whole; torchrun spreads its base model over them anyway.",
            "Leave --expert-parallel out.",
        )
    if recipe.router is not None and (isinstance(source, Adapter) or expert_parallel > 1):
        what = "an adapter" if isinstance(source, Adapter) else "experts on several processes"
        raise UsageError(
            f"--router is not for {what}.",
            "It takes the place of the routers of a whole model, whose experts are beside them.",
            "Leave one of the two out.",
        )
    if isinstance(source, Checkpoint) and is_routed(source):
        _check_routed(source, recipe)
    if recipe.bias_update and isinstance(source, Adapter):
        raise UsageError(
            "--bias-update moves the base model's selection biases, and this is an adapter.",
            "What is written is the adapter, which cannot hold changes of the base model.",
            "Leave --bias-update out.",
        )


def _check_routed(source: Checkpoint, recipe: TrainRecipe) -> None:
    """Refuse what a research checkpoint cannot be given: its losses are its router's."""
    if recipe.router is not None:
        check_unrouted(source.config)
    router = source.config["router"]
    if not replaces_all(find(router["name"])):
        return
    for name, own in (("aux_loss", "aux_loss"), ("z_loss", "z_loss"), ("bias_update", "bias_rate")):
        if getattr(recipe, name):
            option = f"--{name.replace('_', '-')}"
            value = router["options"].get(own)
            stated = "" if value is None else f": {own} is {value}"
            anew = "" if value is None else f", or begin anew with --router {router['name']}:{own}=VALUE"
            raise UsageError(
                f"{option} is for a family's own router, and the model is routed by {router['name']}.",
                f"A router has the losses and biases of its paper; their coefficients are in the checkpoint{stated}.",
                f"Leave {option} out{anew}.",
            )
