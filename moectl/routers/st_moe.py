"""ST-MoE (arXiv 2202.08906): GShard's gate with the router z-loss, and a tight capacity in training."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.routers.gshard import GShard, GShardOptions


@dataclass(frozen=True, slots=True)
class StMoeOptions(GShardOptions):
    """As GShard's."""

    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    second: float = 0.2
    z_loss: float = 0.001


class StMoe(GShard):
    """Top-2 with 1.25 places per token and expert in training and 2 in use, a second choice kept with probability
    min(1, g_2 / 0.2), balance 0.01, z-loss 0.001 (eq. 5-6).

    The capacity factor is over tokens, not over choices, as in its Mesh TensorFlow: at 1.25 many second choices are
    dropped, by design. The z-loss and its coefficient are the paper's, the rest was read in the code.
    """

    Options = StMoeOptions
