"""The plainest training loop: AdamW, linear warm-up and a cosine to zero, gradient clipping. Batches in, losses out.

It trains a model that is in memory, for benchmarks that compare models, and is what `moectl train` is checked against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from moectl.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS = (0.9, 0.95)


def train(
    model: PreTrainedModel,
    batches: Iterable[np.ndarray],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 0,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place on `steps` batches of token ids `[B, L]`.

    The loss is the model's own: next-token cross-entropy, with the balancing loss of a MoE whose configuration asks
    for one. Matrices decay, vectors (norms, biases) do not.

    Args:
        warmup: steps until `learning_rate` is reached, from zero; a cosine leads back to zero.
        clip: largest norm of the gradient over all parameters.
        on_step: told the step, from 1, and its loss.

    Returns:
        The loss of each step, in nats per token.

    Raises:
        CheckFailed: a loss is not finite; the message names the step, and the weights are those before it.
        InputError: fewer batches than steps.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=BETAS,
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    losses: list[float] = []
    model.train()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        token_BL = torch.from_numpy(batch).to(model.device)
        loss = model(input_ids=token_BL, labels=token_BL, use_cache=False).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise CheckFailed(
                f"The training loss became {losses[-1]} at step {step} of {steps}.",
                "Every weight would be lost in the next update.",
                "Lower the learning rate, or warm up for longer.",
            )
        loss.backward()
        clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step:
            on_step(step, losses[-1])
    if len(losses) < steps:
        raise InputError(
            f"The data ended after {len(losses)} of {steps} training steps.",
            "The learning rate had not come down yet, so the model is not finished.",
            "Give more data, or let it repeat.",
        )
    return losses
