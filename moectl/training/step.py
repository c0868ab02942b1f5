"""One optimiser step: micro-batches forward and backward, the losses that are switched on, clipping, biases, numbers.

Shapes: B sequences of L tokens, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from moectl.routers.bias import step_towards_mean
from moectl.routers.losses import balance, z_loss
from moectl.routers.protocol import wide
from moectl.routers.thor import consistency
from moectl.training.pesc import PescWatch
from moectl.training.recipe import TrainRecipe
from moectl.training.routers import RouterWatch
from moectl.training.routing import RoutedWatch
from moectl.training.world import World

IGNORED = -100
"""The target of a token that is not learnt."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step found before the weights moved; `aux` and `z` are summed over layers, `load` counted `[L, E]`."""

    loss: float
    aux: float
    z: float
    load: Tensor | None


class Step:
    """The computation of a step over a model that is in its place (and sharded) already.

    A step computes the same whatever the number of processes: assignments are counted over the whole micro-batch before
    the balancing loss is taken, so that it too is a mean over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: RouterWatch | PescWatch | RoutedWatch | None,
        recipe: TrainRecipe,
        world: World,
    ) -> None:
        self.model = model
        self.watch = watch
        self.recipe = recipe
        self.world = world

    def gradients(self, batch: Tensor, learnt: Tensor, source: Tensor | None = None) -> Computed:
        """Forward and backward over the rows `[B, L]` of the whole step, of which this process takes its slices.

        With `source` `[B, S]` they are what the decoder of an encoder-decoder reads.

        The loss is the mean over all tokens of the step that are `learnt` `[B, L]`, each predicted from those before.
        """
        target = batch.masked_fill(~learnt, IGNORED)
        # Divides a sum so that the mean over processes and micro-batches is the mean over tokens.
        count = max(1, int(learnt[:, 1:].sum())) / (self.world.size * self.recipe.accumulate)
        micro = self.recipe.micro_batch
        own = micro // self.world.size
        totals = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        load: Tensor | None = None
        for first in range(0, len(batch), micro):
            start = first + self.world.rank * own
            token_BL, target_BL = (rows[start : start + own].to(self.world.device) for rows in (batch, target))
            inputs = {"input_ids": token_BL}
            if source is not None:
                given_BS = source[start : start + own].to(self.world.device)
                inputs = {"input_ids": given_BS, "decoder_input_ids": token_BL}
            parts, load_LE = self._micro_batch(inputs, target_BL, count)
            totals += parts
            if load_LE is not None:
                load = load_LE if load is None else load + load_LE
        totals = self.world.sum(totals) / (self.world.size * self.recipe.accumulate)
        loss, aux, z = totals.tolist()
        return Computed(loss, aux, z, load)

    def update(
        self, computed: Computed, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any
    ) -> float:
        """Clip, step, forget the gradients, move the selection biases; returns the norm before clipping.

        A norm that is not finite is returned before anything has moved.
        """
        value = _clip(parameters, self.recipe.clip)
        if not math.isfinite(value):
            return value
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(self.watch, RoutedWatch) and computed.load is not None:
            self.watch.after_step(computed.load)
        if self.recipe.bias_update and self.watch and computed.load is not None:
            for block, load_E in zip(self.watch.blocks, computed.load, strict=True):
                if block.bias is not None:
                    step_towards_mean(block.bias.data, load_E[: block.num_experts], self.recipe.bias_update)
        return value

    def _micro_batch(self, inputs: dict[str, Tensor], target_BL: Tensor, count: float) -> tuple[Tensor, Tensor | None]:
        target_T = target_BL[:, 1:].flatten()
        logits_TV, loss = self._predicted(inputs, target_T, count)
        aux, z, load_LE = self._router_losses()
        total = loss + self.recipe.balance * aux + self.recipe.z_loss * z
        if isinstance(self.watch, RoutedWatch):
            own = self.watch.loss
            if self.watch.consistency:
                again_TV, other = self._predicted(inputs, target_T, count)
                self.watch.take()
                apart_T = consistency(logits_TV, again_TV) * (target_T != IGNORED)
                own = own + self.watch.loss + other + self.watch.consistency * apart_T.sum() / count
            total, aux = total + own, own
        (total / self.recipe.accumulate).backward()
        zero = loss.new_zeros(())
        parts = torch.stack([(part if isinstance(part, Tensor) else zero).detach() for part in (loss, aux, z)])
        return parts.double(), load_LE

    def _predicted(self, inputs: dict[str, Tensor], target_T: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """Logits `[T, V]` of a pass, and its loss."""
        kind = self.world.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            logits_BLV = self.model(**inputs, use_cache=False).logits
        logits_TV = logits_BLV[:, :-1].flatten(0, 1).float()
        return logits_TV, cross_entropy(logits_TV, target_T, ignore_index=IGNORED, reduction="sum") / count

    def _router_losses(self) -> tuple[Any, Any, Tensor | None]:
        """Balancing loss and z-loss, each summed over the layers, and the assignments of all processes `[L, E]`."""
        if self.watch is None:
            return 0.0, 0.0, None
        logits, load_LE = self.watch.take()
        load_LE = self.world.sum(load_LE)
        aux: Any = 0.0
        z: Any = 0.0
        # What is not switched on is measured all the same, but without a graph.
        with torch.set_grad_enabled(bool(self.recipe.balance)):
            for logits_TE, load_E in zip(logits, load_LE, strict=False):  # routers of ours come after, without logits
                aux = aux + balance(wide(logits_TE).softmax(-1), load_E[: logits_TE.shape[-1]])
        with torch.set_grad_enabled(bool(self.recipe.z_loss)):
            for logits_TE in logits:
                z = z + z_loss(logits_TE)
        return aux, z, load_LE


def _clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit` and return what it was.

    torch's own function cannot take gradients that are sharded over different processes, as experts and the rest are
    under expert parallelism, at once.
    """
    places: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            places.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [get_total_norm(gradients) for gradients in places.values()]
    value = math.hypot(*(float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms))
    if limit < value < math.inf:
        for gradients in places.values():
            torch._foreach_mul_(gradients, limit / value)
    return value
