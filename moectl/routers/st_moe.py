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

    The capacity factor is over tokens, not over choices: at 1.25 many second choices are dropped, by design.

    Implementations: Mesh TensorFlow (`_top_2_gating` with `set_default_moe_hparams`) is followed, but for the z-loss,
    which it does not have and which is the paper's. It draws for second choices in use too, where ours takes all, and
    counts room in groups of 1024 tokens. flaxformer has the z-loss; its routers keep every second choice, and weigh by
    p itself, not over the sum of two.
    """

    Options = StMoeOptions
