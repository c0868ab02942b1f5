"""DeepSeek-V3 (arXiv 2412.19437) and the loss-free balancing it uses (arXiv 2408.15664): a bias steers the choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers import expert_groups
from moectl.routers.bias import step_towards_mean
from moectl.routers.choice import choose
from moectl.routers.losses import sequence_load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, all_served, top, wide


@dataclass(frozen=True, slots=True)
class DeepSeekV3Options(Options):
    """The values of the 671B model.

    Attributes:
        top_k: routed experts per token, beside the shared one.
        groups: nodes, each with as many consecutive experts.
        top_groups: nodes that a token may reach.
        scale: of the weights.
        normalize: whether weights add up to `scale`.
        bias_rate: step of the selection bias after each step of training (gamma).
        aux_loss: coefficient of the balance within each sequence (alpha).
    """

    top_k: int = 8
    groups: int = 8
    top_groups: int = 4
    scale: float = 2.5
    normalize: bool = True
    bias_rate: float = 0.001
    aux_loss: float = 0.0001


class DeepSeekV3(Router):
    """s = sigmoid(z); the 4 nodes with the largest sum of their 2 best s + b; the K best s + b there; weights s over
    their sum, times 2.5 (section 2.1.2, eq. 12-16). The bias b is in the choice only, and moves by gamma * sign(mean
    load - load) after each step.

    Loss: the balance of each sequence, of s divided by its sum over experts and of how often an expert is among the K
    best s, whatever b and the nodes made of it (eq. 17-20).

    Implementations: nodes are ranked by the sum of their K / M best in the paper and in Megatron-LM, of their 2 best in
    the official inference code, transformers and SGLang: the same for K = 8, M = 4; here 2. Experts of closed nodes
    score 0 in the released model and in the inference code's first versions, so that they win over an open one with
    s + b < 0; -inf in its later ones, transformers, SGLang, Megatron-LM and here. Weights are divided by their sum, to
    which transformers, Megatron-LM and this add 1e-20. Megatron-LM moves b and counts for the loss as here; it and
    transformers have no loss over nodes. torchtitan takes the mean off each step of b, which no choice can tell.
    """

    Options = DeepSeekV3Options
    bias: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: DeepSeekV3Options | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        expert_groups.check(num_experts, self.options.groups, self.options.top_groups, self.options.top_k)
        self.register_buffer("bias", torch.zeros(num_experts))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss."""
        options = self.options
        index_TK, weight_TK = choose(
            scores_TE,
            options.top_k,
            score="sigmoid",
            bias_E=self.bias,
            groups=options.groups,
            top_groups=options.top_groups,
            normalize=options.normalize,
            scale=options.scale,
        )
        loss = None
        if context.training and options.aux_loss:
            affinity_TE = wide(scores_TE).sigmoid()
            share_TE = affinity_TE / affinity_TE.sum(1, keepdim=True)
            best_TK = top(affinity_TE, options.top_k)
            loss = options.aux_loss * sequence_load_balancing(share_TE, best_TK, context.sequence_T)
        return all_served(index_TK, weight_TK, loss)

    def after_step(self, load_E: Tensor) -> None:
        """Move the bias towards experts with less than the mean load."""
        step_towards_mean(self.bias, load_E, self.options.bias_rate)


@dataclass(frozen=True, slots=True)
class LossFreeOptions(DeepSeekV3Options):
    """As DeepSeek-V3's, with the values of its own paper's 1B model: no nodes, no loss, plain weights."""

    top_k: int = 6
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    normalize: bool = False
    aux_loss: float = 0.0


class LossFree(DeepSeekV3):
    """The K best sigmoid(z) + b, weights sigmoid(z) (arXiv 2408.15664, eq. 3 and algorithm 1; numbers from memory).

    Implementations: Megatron-LM steps b by the sign of mean load less load, summed over all processes, as here, and
    divides the weights by their sum: `normalize=yes`. torchtitan takes the mean of the steps off, and says that this is
    not the paper's; choices are the same.
    """

    Options = LossFreeOptions
