"""The assignment of tokens to experts with the largest sum of scores, no expert taking more than its room. Exact.

Tokens are placed one by one, each by the cheapest chain of moves that ends at a free place: T shortest paths over E
experts, and not over T tokens and T places as a matching's would be. Legend: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moectl.compiled import compiled


@torch.no_grad()
def balanced(scores_TE: Tensor, room: int) -> Tensor:
    """The expert of each token, int64 [T], on the scores' device; it is found on the CPU, which waits for them.

    Raises:
        ValueError: there are more tokens than places.
    """
    T, E = scores_TE.shape
    if E * room < T:
        raise ValueError(f"{T} tokens do not fit into {E} experts with {room} places each")
    expert_T = _assign(scores_TE.double().cpu().numpy(), room)
    return torch.from_numpy(expert_T).to(scores_TE.device)


@torch.no_grad()
def losses_of_moving(scores_TE: Tensor, expert_T: Tensor, room: int) -> Tensor:
    """What a place at `a` in exchange for one at `b` costs the best assignment, float64 [E, E] (a, b), 0 at a = b.

    A token leaves `a`, maybe another where it arrives, and so on until `b`, all at the least loss of score. The best
    assignment of all tokens but one, which is at `b`, is worth this much less when that one takes a place at `a`.
    """
    scores_TE, E = scores_TE.double().cpu(), scores_TE.shape[1]
    expert_T = expert_T.cpu()
    at_T = scores_TE.gather(1, expert_T[:, None])
    loss_EE = torch.full((E, E), torch.inf, dtype=torch.float64)
    loss_EE.scatter_reduce_(0, expert_T[:, None].expand_as(scores_TE), at_T - scores_TE, "amin")
    free_E = expert_T.bincount(minlength=E) < room
    loss_EE[free_E] = loss_EE[free_E].clamp(max=0)
    loss_EE.fill_diagonal_(0)
    for via in range(E):  # Floyd and Warshall: there are no cycles that gain, since the assignment is the best one
        loss_EE = torch.minimum(loss_EE, loss_EE[:, via, None] + loss_EE[None, via])
    return loss_EE


@compiled
def _assign(score_TE: np.ndarray, room: int) -> np.ndarray:
    """Dijkstra over experts, on losses made non-negative by the experts' prices, which stay 0 while there is room."""
    T, E = score_TE.shape
    expert_T = np.full(T, -1, np.int64)
    slot_T = np.zeros(T, np.int64)
    member_ER = np.zeros((E, room), np.int64)
    count_E = np.zeros(E, np.int64)
    price_E = np.zeros(E)
    loss_EE = np.full((E, E), np.inf)  # of the token that is moved from a to b at the least loss, which is:
    mover_EE = np.full((E, E), -1, np.int64)
    stale_EE = np.zeros((E, E), np.bool_)
    for token in range(T):
        distance_E = price_E - score_TE[token]
        before_E = np.full(E, -1, np.int64)
        done_E = np.zeros(E, np.bool_)
        end = -1
        while end < 0:
            near = -1
            for e in range(E):
                if not done_E[e] and (near < 0 or distance_E[e] < distance_E[near]):
                    near = e
            done_E[near] = True
            if count_E[near] < room:
                end = near
                break
            for e in range(E):
                if done_E[e]:
                    continue
                if stale_EE[near, e]:
                    loss_EE[near, e] = np.inf
                    for place in range(count_E[near]):
                        other = member_ER[near, place]
                        loss = score_TE[other, near] - score_TE[other, e]
                        if loss < loss_EE[near, e]:
                            loss_EE[near, e], mover_EE[near, e] = loss, other
                    stale_EE[near, e] = False
                there = distance_E[near] + loss_EE[near, e] + price_E[e] - price_E[near]
                if there < distance_E[e]:
                    distance_E[e], before_E[e] = there, near
        for e in range(E):
            if done_E[e]:
                price_E[e] += distance_E[end] - distance_E[e]
        place = count_E[end]
        count_E[end] += 1
        arriving = end
        while arriving >= 0:  # from the free place back to the new token: each takes the place of the one that moves on
            origin = before_E[arriving]
            moved = mover_EE[origin, arriving] if origin >= 0 else token
            left = slot_T[moved]
            expert_T[moved], slot_T[moved], member_ER[arriving, place] = arriving, place, moved
            for e in range(E):
                if origin >= 0 and mover_EE[origin, e] == moved:
                    stale_EE[origin, e] = True
                loss = score_TE[moved, arriving] - score_TE[moved, e]
                if not stale_EE[arriving, e] and loss < loss_EE[arriving, e]:
                    loss_EE[arriving, e], mover_EE[arriving, e] = loss, moved
            arriving, place = origin, left
    return expert_T
