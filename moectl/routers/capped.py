"""Experts that choose their tokens, where no token may have more than a few of them (arXiv 2202.09368, section 3.3).

    maximise sum_te S_te A_te + STRENGTH * H(A)   over   0 <= A_te <= 1,   sum_t A_te = room,   sum_e A_te <= most

The solution is A_te = min(1, exp(S_te / STRENGTH - a_e - b_t)) with prices a of experts and b >= 0 of tokens. A round
finds first all b, then all a, that meet their own sums exactly: these are Dykstra's projections on two sets in turn, in
the geometry of the entropy. The paper projects so too; on which sets we could not read. Here the bounds 0 and 1 are in
both: with a set of their own, it takes about as many rounds as an expert has places.
Legend: T tokens, E experts, N rows, M columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRENGTH, ROUNDS = 0.001, 100
"""Of the entropy, and of Dykstra's algorithm: as two summaries of the paper have them."""


@torch.no_grad()
def assigned(share_TE: Tensor, room: int, most: int, strength: float = STRENGTH, rounds: int = ROUNDS) -> Tensor:
    """log A, but for the bound 1: of two places that are surely taken, the surer one has more; float64 [T, E].

    An expert's `room` tokens are those where it is largest. The program is solved for shares of a place: where a last
    place is shared, a token can have one expert more than `most`.

    Args:
        share_TE: S.
        room: tokens of each expert, at most T and at most T * most / E.
        most: experts of a token, at most E.
    """
    scaled_TE = share_TE.double() / strength
    token_T1 = scaled_TE.new_zeros(len(scaled_TE), 1)
    expert_1E = _price(scaled_TE.t(), room).t()
    for _ in range(rounds):
        before_T1, token_T1 = token_T1, _price(scaled_TE - expert_1E, most).clamp(min=0)
        expert_1E = _price((scaled_TE - token_T1).t(), room).t()
        if torch.allclose(before_T1, token_T1, rtol=0, atol=1e-6):
            break
    return scaled_TE - expert_1E - token_T1


def _price(log_NM: Tensor, total: int) -> Tensor:
    """p with sum_m min(1, exp(log_nm - p_n)) = total, [N, 1].

    If all but the m largest are below 1, p is the log-sum-exp of the rest less log(total - m): m is the first for which
    they are.
    """
    top_NK, index_NK = log_NM.topk(total)
    beyond_N1 = log_NM.scatter(1, index_NK, -math.inf).logsumexp(1, keepdim=True)
    rest_NK = torch.cat([beyond_N1, top_NK.flip(1)], 1).logcumsumexp(1)[:, 1:].flip(1)
    price_NK = rest_NK - torch.arange(total, 0, -1, device=log_NM.device).to(log_NM.dtype).log()
    return price_NK.gather(1, (top_NK <= price_NK).int().argmax(1, keepdim=True))
