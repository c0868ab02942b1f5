"""MoEC (arXiv 2207.09094): experts in clusters, kept alike inside by a loss, some of each left out in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.losses import load_balancing
from moectl.routers.noise import uniform
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class MoecOptions(Options):
    """Of the released code's example.

    Attributes:
        groups: clusters.
        dropout: share of each cluster's experts that a training batch does without; one is always left.
        aux_loss: coefficient of the balancing loss and of what is added to it.
        variance: of the variance of mean probabilities within a cluster, inside that.
        apart: whether the variance counts less (by e^-d) the further (d) the most probable experts, as many as a
            cluster has, are above the next ones.
    """

    top_k: int = 1
    groups: int = 8
    dropout: float = 0.5
    aux_loss: float = 0.01
    variance: float = 1.0
    apart: bool = False


class Moec(Router):
    """Top-1 of what is left; y = sigmoid(z_e) E_e(x) + (1 - sigmoid(z_e)) x, so the weight is of what E_e adds (section
    3, number from memory).

    loss = balance + variance * E * mean over clusters of var(P_e in the cluster), P the mean of softmax(z). Each
    cluster draws the experts that it leaves out anew for each batch.

    Implementations: one is known, the authors' xy980523/MoEc_model (`gdmoe` and `tmoe_edrop`, `top1gate.py` and
    `moe_layer.py`). There z is a cosine over a temperature, learnt from 0.07 and fixed at that in the loss; P is a sum
    over tokens and not their mean, in both terms, so that the variance grows with the batch; the variance is over all
    experts (`coef_type` 0), within clusters (1), or that with `apart` (2). The draw is kept for `dropout_interval`
    calls, and the numbers drawn are those within a machine, repeated for each one: all clusters drop the same, and the
    gate reads the first cluster's rows for all of them. An expert's tokens beyond its capacity keep their hidden state;
    here none is dropped.
    """

    Options = MoecOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: MoecOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if num_experts % self.options.groups or not 0 <= self.options.dropout < 1:
            raise ValueError(f"groups is to divide {num_experts} experts, dropout in [0, 1): {self.options}")
        if self.options.top_k > self.options.groups * self.survivors:
            raise ValueError(f"top_k is {self.options.top_k}, and dropout leaves fewer experts")

    @property
    def survivors(self) -> int:
        """How many experts of a cluster a training batch has."""
        return max(1, int((1 - self.options.dropout) * (self.num_experts // self.options.groups)))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss."""
        options, scores_TE = self.options, wide(scores_TE)
        choice_TE, loss = scores_TE, None
        if context.training:
            draw_GE = uniform((options.groups, self.num_experts // options.groups), scores_TE, context)
            left_GE = draw_GE.argsort(1).argsort(1) < self.survivors
            choice_TE = scores_TE.masked_fill(~left_GE.flatten(), -math.inf)
        index_TK = top(choice_TE, options.top_k)
        if context.training:
            probability_TE = choice_TE.softmax(-1)
            mean_GE = probability_TE.mean(0)[left_GE.flatten()].view(options.groups, -1)
            spread = variance_within(mean_GE, options.apart)
            balance = load_balancing(probability_TE, index_TK) * mean_GE.numel() / self.num_experts
            loss = options.aux_loss * (balance + options.variance * mean_GE.numel() * spread)
        return routing(index_TK, scores_TE.gather(1, index_TK).sigmoid(), aux_loss=loss)


def variance_within(mean_GE: Tensor, apart: bool = False) -> Tensor:
    """The mean over clusters of the sample variance within one; see `MoecOptions.apart`."""
    groups, size = mean_GE.shape
    if size == 1:
        return mean_GE.new_zeros(())
    variance = mean_GE.var(1).mean()
    if apart and groups > 1:
        sorted_GE = mean_GE.flatten().sort(descending=True).values.view(groups, size).mean(1)
        variance = variance * torch.exp(sorted_GE[1] - sorted_GE[0])
    return variance
