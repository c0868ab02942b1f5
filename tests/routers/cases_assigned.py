"""Cases of routers that assign, look up in tables, or let experts choose; references loop over tokens and experts.

Legend: T tokens, D hidden, E experts, K choices.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from by_hand import Chosen, Row, best, sigmoid, softmax
from case import Case, at_most_one, one
from cases_top_k import each, queued
from scipy.optimize import minimize
from torch import Tensor

from moectl.routers.capacity import capacity
from moectl.routers.protocol import Context, Router


def with_tokens(tokens: int) -> Context:
    """Ids of a large vocabulary, in two sequences."""
    draw = torch.Generator().manual_seed(1)
    half_T = (torch.arange(tokens) * 2 // tokens).long()
    return Context(token_T=torch.randint(50_000, (tokens,), generator=draw), sequence_T=half_T, generator=draw)


def with_frequent(tokens: int) -> Context:
    """Ids of a small vocabulary."""
    return Context(token_T=torch.randint(160, (tokens,), generator=torch.Generator().manual_seed(1)))


def scrambled(number: int, seed: int) -> int:
    """The published splitmix64: its state after `number + 1` steps from `seed`, mixed; without the highest bit."""
    mask = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & (2**63 - 1)


def base(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    chosen = best(row, 1)
    return chosen, [sigmoid(row)[chosen[0]]]


def s_base_of_two(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    chosen = best(row, 2)
    return chosen, [softmax(row)[e] for e in chosen]


def kool(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    return best(row, 1), [1.0]


def hashed(router: Router, _scores_TE: np.ndarray, context: Context) -> Chosen:
    assert context.token_T is not None
    seeds = range(router.options.top_k)
    index_TK = np.array([[scrambled(token, k) % 8 for k in seeds] for token in context.token_T.tolist()])
    return index_TK, np.ones(index_TK.shape)


def of_two_tokens(_router: Router, _scores_TE: np.ndarray, context: Context) -> Chosen:
    assert context.token_T is not None and context.sequence_T is not None
    index, before, sequence = [], -1, 0
    for token, own in zip(context.token_T.tolist(), context.sequence_T.tolist(), strict=True):
        before = -1 if own != sequence else before
        key = (scrambled(before, 0) + token) & (2**64 - 1)
        index.append([scrambled(key, 0) % 8])
        before, sequence = token, own
    return np.array(index), np.ones((len(index), 1))


def mowe(_router: Router, _scores_TE: np.ndarray, context: Context) -> Chosen:
    assert context.token_T is not None
    index_T1 = np.array([[token % 8 if token >= 16 else -1] for token in context.token_T.tolist()])
    return index_T1, (index_T1 >= 0).astype(float)


def deepseek_v4(_router: Router, scores_TE: np.ndarray, context: Context) -> Chosen:
    assert context.token_T is not None
    index, weight = [], []
    for row, token in zip(scores_TE.tolist(), context.token_T.tolist(), strict=True):
        chosen = best([scrambled(token * 8 + e, 0) for e in range(8)], 2)
        share = [math.sqrt(math.log1p(math.exp(row[e]))) for e in chosen]
        index.append(chosen)
        weight.append([1.5 * value / sum(share) for value in share])
    return np.array(index), np.array(weight)


def expert_choice(_router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    T, E = scores_TE.shape
    share = [softmax(row) for row in scores_TE]
    taken: list[list[int]] = [[] for _ in range(T)]
    for e in range(E):
        for token in best([share[t][e] for t in range(T)], -(-2 * T // E)):
            taken[token].append(e)
    width = max(map(len, taken))
    index_TK, weight_TK = np.full((T, width), -1), np.zeros((T, width))
    for t, experts in enumerate(taken):
        for k, e in enumerate(sorted(experts, key=lambda e, t=t: (-share[t][e], e))):
            index_TK[t, k], weight_TK[t, k] = e, share[t][e]
    return index_TK, weight_TK


def mod(router: Router, hidden_TD: np.ndarray, context: Context) -> Chosen:
    weight_D = router.weight.detach().double().numpy()[0]
    score_T = [float(sum(h * w for h, w in zip(row, weight_D, strict=True))) for row in hidden_TD]
    sequence_T = [0] * len(score_T) if context.sequence_T is None else context.sequence_T.tolist()
    index_T1, weight_T1 = np.full((len(score_T), 1), -1), np.zeros((len(score_T), 1))
    for sequence in set(sequence_T):
        own = [t for t, number in enumerate(sequence_T) if number == sequence]
        for place in best([score_T[t] for t in own], math.ceil(len(own) / 8)):
            index_T1[own[place], 0], weight_T1[own[place], 0] = 0, score_T[own[place]]
    return index_T1, weight_T1


def shares_by_slsqp(num_experts: int, effective_capacity: float) -> np.ndarray:
    """Eq. 3 of the paper by the optimiser that it names."""
    number_E = np.arange(num_experts)
    width_E = 2.0 ** (number_E + 1 - num_experts)
    found = minimize(
        lambda c_E: -(c_E * 2.0**number_E - 10 * c_E * np.log(c_E + 1e-15)).sum(),
        np.full(num_experts, 1 / num_experts),
        method="SLSQP",
        bounds=[(0, 1)] * num_experts,
        constraints=[
            {"type": "eq", "fun": lambda c_E: c_E.sum() - 1},
            {"type": "eq", "fun": lambda c_E: c_E @ width_E - effective_capacity},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return np.asarray(found.x)


def mone(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    T, E = scores_TE.shape
    share_E = shares_by_slsqp(E, router.options.effective_capacity)
    probability = [softmax(row) for row in scores_TE]
    expert_T = {}
    for e in reversed(range(E)):
        left = [t for t in range(T) if t not in expert_T]
        for place in best([probability[t][e] for t in left], math.floor(share_E[e] * T)):
            expert_T[left[place]] = e
    index_T1 = np.array([[expert_T.get(t, 0)] for t in range(T)])
    return index_T1, np.array([[0.5 * probability[t][index_T1[t, 0]] + 1] for t in range(T)])


def prototyping(_router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    choices, weights = [], []
    for row in scores_TE:
        halves = [softmax(row[:4]), softmax(row[4:])]
        chosen = [best(half, 1)[0] for half in halves]
        choices.append([chosen[0], chosen[1] + 4])
        weights.append([halves[0][chosen[0]], halves[1][chosen[1]]])
    return queued(choices, weights, math.ceil(1.25 * 2 * len(choices) / 8))


def e3(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    choices, weights, k = [], [], router.options.top_k
    for row in scores_TE:
        members = [softmax(row[:4]), softmax(row[4:])]
        choices.append([e + 4 * m for m, member in enumerate(members) for e in best(member, k)])
        weights.append([member[e] for member in members for e in best(member, k)])
    room = math.ceil(router.options.capacity_factor * k * len(choices) / 4)
    return queued(choices, weights, room or len(choices))


def sam(_router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    choices, weights = [], []
    for row in scores_TE:
        share = softmax(row)
        first = 4 * best([sum(share[:4]), sum(share[4:])], 1)[0]
        chosen = [first + e for e in best(share[first : first + 4], 2)]
        choices.append(chosen)
        weights.append([share[e] for e in chosen])
    return queued(choices, weights, math.ceil(2 * len(choices) / 8))


def rectify(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    """One token, one choice, one GPU after the other."""
    (T, E), options = scores_TE.shape, router.options
    share = [softmax(row) for row in scores_TE]
    order = [best(row, E) for row in share]
    index = [[*row[:2], -1] for row in order]
    room = math.ceil(2 * T / E * options.capacity_factor)
    count = [0] * E
    dropped: list[tuple[int, int]] = []
    for k in range(2):
        for t in range(T):
            if count[index[t][k]] < room:
                count[index[t][k]] += 1
            else:
                dropped.append((t, k))
    for t, k in dropped:
        index[t][k] = -1
    for t, k in dropped:
        local = [e for e in range(E) if e // (E // options.groups) == t * options.groups // T]
        others = [e for e in local if e not in index[t]]
        index[t][k] = max(others, key=lambda e, t=t: (share[t][e], -e)) if others and options.intra else -1
    asking = [(share[t][order[t][2]], -t, order[t][2]) for t in range(T) if order[t][2] not in index[t]]
    for _, negative, e in sorted(asking, reverse=True):
        if count[e] < room:
            count[e] += 1
            index[-negative][2] = e
    return np.array(index), np.array([[share[t][e] if e >= 0 else 0.0 for e in row] for t, row in enumerate(index)])


def one_or_none(sum_T: Tensor) -> Tensor:
    return (sum_T == 1) | (sum_T == 0)


def up_to_two(sum_T: Tensor) -> Tensor:
    return (sum_T > 0) & (sum_T < 2 + 1e-5)


CASES = [
    Case("base", each(base), at_most_one),
    Case("s-base", each(base), at_most_one),
    Case("s-base", each(s_base_of_two), at_most_one, {"top_k": 2}),
    Case("kool", each(kool), one, numerical=False, why="an estimator: test_kool.py"),
    Case("kool", each(kool), one, {"estimator": "skip"}, numerical=False, why="an estimator: test_kool.py"),
    Case("hash", hashed, one, context=with_tokens),
    Case("hash", of_two_tokens, one, {"of": "bigram"}, with_tokens),
    Case("multihash", hashed, lambda sum_T: sum_T == 2, context=with_tokens, distinct=False),
    Case("mowe", mowe, one_or_none, context=with_frequent),
    Case("deepseek-v4-hash", deepseek_v4, lambda sum_T: (sum_T - 1.5).abs() < 1e-5, {"top_k": 2}, with_tokens),
    Case("expert-choice", expert_choice, at_most_one, balance=1.001, room=lambda tokens: capacity(tokens, 8, 2, 1)),
    Case(
        "mod",
        mod,
        None,
        context=with_tokens,
        balance=None,
        room=lambda tokens: 2 * math.ceil(math.ceil(tokens / 2) / 8),
        why="weights are what a row of the gate says, and there is one expert",
    ),
    Case(
        "mone",
        mone,
        lambda sum_T: (sum_T > 1) & (sum_T < 1.5),
        {"alpha": 0.5},
        balance=None,
        num_experts=4,
        why="the experts' shares are given",
    ),
    Case("prototyping", prototyping, up_to_two, room=lambda tokens: capacity(tokens, 8, 2, 1.25)),
    Case("moec", each(base), at_most_one, {"groups": 2}),
    Case("rectify", rectify, at_most_one),
    Case("rectify", rectify, at_most_one, {"intra": False}, room=lambda tokens: capacity(tokens, 8, 2, 1)),
    Case("e3", e3, up_to_two, room=lambda tokens: capacity(tokens, 4, 1, 1.5)),
    Case("e3", e3, up_to_two, {"top_k": 2, "capacity_factor": 0.0}),
    Case("sam", sam, at_most_one, {"groups": 2, "alignment": 0.0}, room=lambda tokens: capacity(tokens, 8, 2, 1)),
]
