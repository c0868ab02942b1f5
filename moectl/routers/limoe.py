"""LIMoE (arXiv 2206.02770): one router for images and text, kept in balance by entropies of each modality."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from moectl.routers.capacity import capacity, kept
from moectl.routers.choice import choose
from moectl.routers.labels import labelled, rows
from moectl.routers.losses import entropy
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class LimoeOptions(Options):
    """Values of coefficients and of the soft minimum are from memory.

    Attributes:
        modalities: how many there are.
        capacity_factor: places per expert over tokens per expert; 0: no limit.
        local_loss: coefficient of the local entropy.
        global_loss: coefficient of the thresholded global entropy.
        soft_minimum: how many experts each modality is to use at least; the threshold is its logarithm.
    """

    top_k: int = 1
    modalities: int = 2
    capacity_factor: float = 1.05
    local_loss: float = 0.04
    global_loss: float = 0.04
    soft_minimum: float = 4.0


class Limoe(Router):
    """Top-1 of softmax(W h), weight p; the most certain tokens of the batch, of either modality, get places first.

    For each modality m, over its own tokens: local(m) = mean H(p), so that a token knows its expert; global(m) =
    max(0, log S - H(mean p)), so that the modality does not collapse onto fewer than S experts (section 2.2; number
    from memory). Both are averaged over the modalities there are; the paper chooses which modality gets which.

    Implementations: the authors' code was not found. koayon/ml-implementations quotes the paper on the threshold, for
    each modality max(0, tau + Omega_global) with tau = log S, so that at least S experts are used, and has the local
    loss as here; its own global loss has the sign of the entropy turned and no threshold. kyegomez/LIMoE has neither
    loss. That the surest tokens come first, that modalities are averaged, and the values of the options are from
    memory.
    """

    Options = LimoeOptions

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the entropy losses."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k)
        room_TK = None
        if options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor)
            room_TK = kept(index_TK, self.num_experts, room, weight_TK[:, 0].detach())
        loss = None
        if context.training:
            modality_T = labelled(context.modality_T, options.modalities, "modality")
            loss = entropy_loss(wide(scores_TE).softmax(-1), modality_T, options)
        return routing(index_TK, weight_TK, room_TK, loss)


def entropy_loss(probability_TE: Tensor, modality_T: Tensor, options: LimoeOptions) -> Tensor:
    """Local and thresholded global entropy of each modality, with coefficients, averaged over modalities."""
    threshold = math.log(min(options.soft_minimum, probability_TE.shape[-1]))
    losses = []
    for _, row_R in rows(modality_T, options.modalities):
        own_RE = probability_TE[row_R]
        missing = (threshold - entropy(own_RE.mean(0))).clamp(min=0)
        losses.append(options.local_loss * entropy(own_RE).mean() + options.global_loss * missing)
    return sum(losses, probability_TE.new_zeros(())) / max(len(losses), 1)
