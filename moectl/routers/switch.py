"""Switch Transformer (arXiv 2101.03961): one expert per token, over its probability, with a capacity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.capacity import capacity, kept, places
from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing
from moectl.routers.noise import jittered
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, counts, routing, wide


@dataclass(frozen=True, slots=True)
class SwitchOptions(Options):
    """Section 2.2 and appendix.

    Attributes:
        capacity_factor: places per expert over tokens per expert; 0: no limit.
        sequence_room: in place of a factor, places per expert in each sequence (transformers' `expert_capacity`, 64).
        attempts: how many experts a token asks, the best first, until one has room; more than one needs a factor.
        jitter: training multiplies what the gate is given by U(1 - jitter, 1 + jitter).
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    capacity_factor: float = 1.25
    sequence_room: int = 0
    attempts: int = 1
    jitter: float = 0.01
    aux_loss: float = 0.01


class Switch(Router):
    """y = p_e * E_e(x) with e = argmax p (eq. 2); a token that finds its expert full goes nowhere.

    Room is the capacity factor times tokens per expert (eq. 3), the loss E * sum f P (eq. 4-6). With `attempts` a token
    that finds its expert full asks the next best, after all tokens have asked theirs: the paper's No-Token-Left-Behind,
    which lets later tokens matter.

    Implementations: Mesh TensorFlow (`_switch_gating`) jitters if its policy says so, tries `moe_switch_top_k` experts
    as `attempts` does, counts room in groups of tokens and, in its layer of two levels, rounds it down, to 4 at least.
    flaxformer (`TokensChooseMaskedRouter`) has a gate with a bias, can serve tokens by falling probability (as `VMoe`),
    and gives a z-loss. transformers has a fixed room per *sequence* (`sequence_room`), and in float32 its jitter
    multiplies what experts are given too. Here the group is all that is routed, and room is rounded up.
    """

    Options = SwitchOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: SwitchOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        options = self.options
        alone = options.top_k == 1 and options.capacity_factor and not options.sequence_room
        if not 1 <= options.attempts <= num_experts or (options.attempts > 1 and not alone):
            raise ValueError(f"attempts are of one expert per token with a capacity factor, at most {num_experts}")

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss of eq. 4."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, max(options.top_k, options.attempts))
        first_TK, room_TK = index_TK[:, : options.top_k], None
        if options.sequence_room:
            room_TK = kept(index_TK, self.num_experts, options.sequence_room, sequence_T=context.sequence_T)
        elif options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor)
            if options.attempts > 1:
                index_TK, weight_TK, room_TK = served(index_TK, weight_TK, self.num_experts, room)
            else:
                room_TK = kept(index_TK, self.num_experts, room)
        loss = None
        if context.training:
            loss = options.aux_loss * load_balancing(wide(scores_TE).softmax(-1), first_TK)
        return routing(index_TK, weight_TK, room_TK, loss)


def served(index_TK: Tensor, weight_TK: Tensor, num_experts: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's first expert, in its order of preference, that has room when all tokens have asked the one before.

    Returns:
        (index, weight, whether it found one) [T, 1]; where it found none, its first choice.
    """
    free_E = index_TK.new_full((num_experts,), room)
    rank_T1 = torch.full_like(index_TK[:, :1], -1)
    for rank in range(index_TK.shape[1]):
        asking_T1 = torch.where(rank_T1 < 0, index_TK[:, rank : rank + 1], NO_EXPERT)
        placed_T1 = (rank_T1 < 0) & (places(asking_T1, num_experts) < free_E[asking_T1])
        rank_T1 = torch.where(placed_T1, rank, rank_T1)
        free_E = free_E - counts(torch.where(placed_T1, asking_T1, NO_EXPERT), num_experts)
    at_T1 = rank_T1.clamp(min=0)
    return index_TK.gather(1, at_T1), weight_TK.gather(1, at_T1), rank_T1 >= 0
