"""DeepSeekMoE (arXiv 2401.06066): many small experts, some always on, balanced over experts and devices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers import expert_groups
from moectl.routers.choice import choose
from moectl.routers.losses import sequence_load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, all_served, counts, wide


@dataclass(frozen=True, slots=True)
class DeepSeekMoeOptions(Options):
    """The values of the 16B model.

    Attributes:
        top_k: routed experts per token, beside the shared ones.
        aux_loss: coefficient of the balance over experts (alpha_1).
        device_loss: coefficient of the balance over devices (alpha_2); 0.05 in the 145B model.
        groups: devices, each with as many consecutive experts.
    """

    top_k: int = 6
    aux_loss: float = 0.001
    device_loss: float = 0.0
    groups: int = 1


class DeepSeekMoe(Router):
    """g = softmax over routed experts, the K best as they are (eq. 9-11); shared experts are no business of a router.

    Losses (section 3.3): alpha_1 sum_i f_i P_i, f_i = N / (K T) * assignments (eq. 12-14), and alpha_2 sum_d f'_d P'_d,
    f' the mean of f and P' the sum of P in a device (eq. 15-17). The first one is that of each sequence where sequences
    are known.

    Implementations: the released `MoEGate`, copied into many models, balances each sequence or the whole batch by an
    option, can divide the weights by their sum, and has no loss over devices; nor was the 16B model trained with one.
    The choice is transformers' DeepSeek-V2 with `topk_method` greedy, times its scale: `deepseek-v2:groups=1,top=1`.
    """

    Options = DeepSeekMoeOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: DeepSeekMoeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        expert_groups.check(num_experts, self.options.groups, self.options.groups, self.options.top_k)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k)
        loss = None
        if context.training:
            probability_TE = wide(scores_TE).softmax(-1)
            loss = options.aux_loss * sequence_load_balancing(probability_TE, index_TK, context.sequence_T)
            loss = loss + options.device_loss * device_balance(probability_TE, index_TK, options.groups)
        return all_served(index_TK, weight_TK, loss)


def device_balance(probability_TE: Tensor, index_TK: Tensor, groups: int) -> Tensor:
    """sum_d f'_d P'_d over devices of consecutive experts; 1 at balance (arXiv 2401.06066, eq. 15-17)."""
    num_experts = probability_TE.shape[1]
    load_E = counts(index_TK, num_experts).to(probability_TE.dtype)
    frequency_E = num_experts * load_E / load_E.sum().clamp(min=1)
    mean_G = frequency_E.view(groups, -1).mean(1)
    return (mean_G * probability_TE.mean(0).view(groups, -1).sum(1)).sum()
