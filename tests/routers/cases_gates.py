"""Cases of routers with gates of another form than a top-k of a softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from by_hand import Chosen as Found
from by_hand import best as ordered
from by_hand import sigmoid, softmax
from case import Case, at_most_one, one
from torch import Tensor

from moectl.routers.protocol import Context, Router

VOCABULARY = 512


def parameters(router: Router) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in router.named_parameters()}


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt(sum(value * value for value in row))


def nonzero(weight_TE: list[np.ndarray]) -> Found:
    """All experts of each token by their weight, -1 where it is 0."""
    index = [[e if row[e] else -1 for e in ordered(row)] for row in weight_TE]
    return np.array(index), np.array([[row[e] for e in ordered(row)] for row in weight_TE])


def adaptive_mixtures(_router: Router, scores_TE: np.ndarray, _context: Context) -> Found:
    return nonzero([softmax(row) for row in scores_TE])


def dselect_k(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, gamma, K, E = parameters(router), router.options.gamma, router.options.top_k, router.num_experts
    M = int(np.ceil(np.log2(E)))

    def step(t: float) -> float:
        if t <= -gamma / 2 or t >= gamma / 2:
            return float(t > 0)
        return float(-2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5)

    weights = []
    for x in hidden_TD:
        share = softmax(has["weight"] @ x + has["bias"])
        z = (has["code_weight"] @ x + has["code_bias"]).reshape(K, M)
        total = np.zeros(E)
        for j in range(K):
            for e in range(E):
                bits = format(e, f"0{M}b")
                total[e] += share[j] * np.prod(
                    [step(z[j, b]) if bits[b] == "1" else 1 - step(z[j, b]) for b in range(M)]
                )
        weights.append(total)
    return nonzero(weights)


def thor(router: Router, scores_TE: np.ndarray, context: Context) -> Found:
    """The same draws, ordered by hand."""
    drawn_TE = torch.rand(scores_TE.shape, generator=context.generator).numpy()
    K = router.options.top_k
    return np.array([ordered(-row)[:K] for row in drawn_TE]), np.full((len(scores_TE), K), 1 / K)


def stable_moe(router: Router, hidden_TD: np.ndarray, context: Context) -> Found:
    assert context.token_T is not None
    has, E = parameters(router), router.num_experts
    room, taken = -int(-2.0 * len(hidden_TD) // E), [0] * E
    index, weight = [], []
    for x, token in zip(hidden_TD, context.token_T.tolist(), strict=True):
        best = ordered(has["distilled_weight"] @ has["embedding"][token])[0]
        fits = taken[best] < room
        index.append([best if fits else -1])
        weight.append([sigmoid([has["weight"][best] @ x])[0] if fits else 0.0])
        taken[best] += 1
    return np.array(index), np.array(weight)


def evo_moe(_router: Router, scores_TE: np.ndarray, _context: Context) -> Found:
    best = [ordered(row)[:1] for row in scores_TE]
    return np.array(best), np.array([[softmax(row)[e] for e in top] for row, top in zip(scores_TE, best, strict=True)])


def x_moe(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, options = parameters(router), router.options
    index, weight = [], []
    for x in hidden_TD:
        low = has["projection"] @ x
        low = unit(low) if options.normalize else low
        logits = np.array([low @ unit(e) for e in has["weight"]]) / has["temperature"]
        gates = softmax(logits) if options.gate == "softmax" else sigmoid(logits)
        best = ordered(logits)[: options.top_k]
        index.append(best)
        weight.append([gates[e] for e in best])
    return np.array(index), np.array(weight)


def tutel_cosine(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, K, (T, E) = parameters(router), router.options.top_k, (len(hidden_TD), router.num_experts)
    room = K * int(router.options.capacity_factor * ((T + E - 1) // E)) or T
    index, weight = np.full((T, K), -1), np.zeros((T, K))
    best, gates = [], []
    for x in hidden_TD:
        low = unit(has["projection.weight"] @ x + has["projection.bias"])
        logits = np.array([low @ unit(e) for e in has["weight"]]) * np.exp(min(has["log_scale"][0], np.log(100)))
        best.append(ordered(logits)[:K])
        p = softmax(logits)
        gates.append([p[e] / (sum(p[i] for i in best[-1]) if K > 1 else 1) for e in best[-1]])
    taken = [0] * E
    for k in range(K):
        for t in range(T):
            e = best[t][k]
            if taken[e] < room:
                index[t, k], weight[t, k] = e, gates[t][k]
            taken[e] += 1
    return index, weight


def yuan(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, E, K = parameters(router), router.num_experts, router.options.top_k
    index, weight = [], []
    for x in hidden_TD:
        q, k, v = (has["weight"][part * E : (part + 1) * E] @ x for part in range(3))
        r = np.array([softmax(q[i] * k) @ v for i in range(E)])
        best, p = ordered(r)[:K], softmax(r)
        index.append(best)
        weight.append([p[e] / sum(p[i] for i in best) for e in best])
    return np.array(index), np.array(weight)


def peer(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    """By the scores of all products."""
    has, E, (H, K) = parameters(router), router.num_experts, (router.options.heads, router.options.top_k)
    B = has["column_keys"].shape[1]
    index, weight = [], []
    for x in hidden_TD:
        q = (has["query"] @ x).reshape(2, H, -1)
        token_index: list[int] = []
        token_weight: list[float] = []
        for h in range(H):
            score = np.array(
                [q[0, h] @ has["row_keys"][h, e // B] + q[1, h] @ has["column_keys"][h, e % B] for e in range(E)]
            )
            best = ordered(score)[:K]
            token_index += best
            token_weight += list(softmax(score[best]))
        index.append(token_index)
        weight.append(token_weight)
    return np.array(index), np.array(weight)


def remoe(_router: Router, scores_TE: np.ndarray, _context: Context) -> Found:
    return nonzero([np.array([max(value, 0.0) for value in row]) for row in scores_TE])


def dynmoe(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, E = parameters(router), router.num_experts
    index, weight = [], []
    for x in hidden_TD:
        score = sigmoid([unit(x) @ unit(w) for w in has["weight"]])
        order = ordered(score)
        passing = [e for e in order if score[e] > sigmoid(has["threshold"])[e]] or order[:1]
        index.append([e if e in passing else -1 for e in order])
        weight.append([1 / len(passing) if e in passing else 0.0 for e in order])
    assert np.shape(index) == (len(hidden_TD), E)
    return np.array(index), np.array(weight)


def top_p(router: Router, scores_TE: np.ndarray, _context: Context) -> Found:
    index, weight = [], []
    for row in scores_TE:
        p, total, chosen = softmax(row), 0.0, []
        for e in ordered(row):
            if total <= router.options.threshold:
                chosen.append(e)
            total += p[e]
        left = len(row) - len(chosen)
        index.append([*chosen, *[-1] * left])
        weight.append([*(p[e] for e in chosen), *[0.0] * left])
    return np.array(index), np.array(weight)


def sparse_is_enough(router: Router, hidden_TD: np.ndarray, _context: Context) -> Found:
    has, N, E = parameters(router), router.options.block, router.num_experts
    index, weight = [], []
    for x in hidden_TD:
        z = has["weight"] @ (has["down"] @ x) + has["bias"]
        chosen = [first + ordered(z[first : first + N])[0] for first in range(0, E, N)]
        index.append(chosen)
        scaled = [softmax(z[e // N * N : e // N * N + N])[e % N] for e in chosen]
        weight.append(scaled if router.options.scale else [1.0] * len(chosen))
    return np.array(index), np.array(weight)


def tokens(count: int) -> Context:
    """Token ids that differ."""
    return Context(token_T=torch.arange(count) * 7 % VOCABULARY, generator=torch.Generator().manual_seed(0))


def exactly(total: float) -> Callable[[Tensor], Tensor]:
    return lambda sum_T: (sum_T - total).abs() < 1e-5


def not_negative(sum_T: Tensor) -> Tensor:
    return sum_T >= 0


def stable_room(count: int) -> int:
    return -(-2 * count // 8)


ESTIMATOR = "its gradient is an estimate, held in a test of its own"
DIRECTIONS = "random directions in few dimensions own unequal shares of the sphere"

CASES: list[Case] = [
    Case("adaptive-mixtures", adaptive_mixtures, one),
    Case("dselect-k", dselect_k, one),
    Case("dselect-k", dselect_k, at_most_one, {"top_k": 3, "gamma": 0.5}, num_experts=6),
    Case("thor", thor, one),
    Case("thor", thor, one, {"top_k": 3}),
    Case("stable-moe", stable_moe, at_most_one, {"vocab_size": VOCABULARY}, tokens, room=stable_room),
    Case("evo-moe", evo_moe, at_most_one),
    Case("evo-moe", evo_moe, at_most_one, {"gumbel": False}),
    Case("x-moe", x_moe, at_most_one, balance=3.0, why=DIRECTIONS),
    Case("x-moe", x_moe, None, {"gate": "sigmoid", "normalize": False, "top_k": 2}, balance=3.0, why=DIRECTIONS),
    Case("tutel-cosine", tutel_cosine, at_most_one, room=lambda count: -(-count // 8)),
    Case(
        "tutel-cosine", tutel_cosine, one, {"top_k": 2, "capacity_factor": 0.0, "size": 12}, balance=2.0, why=DIRECTIONS
    ),
    Case("yuan", yuan, one),
    Case("peer", peer, exactly(3), {"top_k": 5, "heads": 3}, distinct=False, num_experts=16),
    Case("peer", peer, exactly(2), {"top_k": 4, "heads": 2, "key_size": 3}, distinct=False, num_experts=12),
    Case("remoe", remoe, not_negative),
    Case("dynmoe", dynmoe, one, numerical=False, why=ESTIMATOR),
    Case("top-p", top_p, at_most_one),
    Case("top-p", top_p, at_most_one, {"threshold": 0.9}),
    Case("sparse-is-enough", sparse_is_enough, exactly(2), {"block": 4}, numerical=False, why=ESTIMATOR),
    Case("sparse-is-enough", sparse_is_enough, None, {"block": 2, "hard": 0.0, "scale": True}),
]
