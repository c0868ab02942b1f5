"""AdamW with its learning rates, which are functions of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from moectl.training import parameters
from moectl.training.recipe import SCHEDULES, TrainRecipe
from moectl.training.routers import MoeBlock

BETAS = (0.9, 0.95)


def optimizer_of(model: nn.Module, blocks: Sequence[MoeBlock], recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, at their peak rates."""
    groups = parameters.groups(
        model,
        blocks,
        learning_rate=recipe.learning_rate,
        router_rate=recipe.learning_rate if recipe.router_rate is None else recipe.router_rate,
        weight_decay=recipe.weight_decay,
    )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, fused=True)


def schedule_of(optimizer: torch.optim.Optimizer, recipe: TrainRecipe) -> Any:
    """The schedule of the recipe, before its first step; the optimiser's rates become those of that step."""
    return get_scheduler(
        SCHEDULES[recipe.schedule],
        optimizer,
        num_warmup_steps=recipe.warmup,
        num_training_steps=recipe.steps,
        scheduler_specific_kwargs={"min_lr_rate": recipe.min_rate} if recipe.schedule == "cosine" else {},
    )


def set_rates(optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> None:
    """Put the schedule where it is after `step` steps: every rate is its peak times a function of the step."""
    schedule.last_epoch = step
    for group, peak, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * factor(step)
