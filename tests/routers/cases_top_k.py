"""Cases of routers that take the top of a softmax or sigmoid: their references are loops over tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from by_hand import Chosen, Row, best, sigmoid, softmax
from case import Case, at_most_one, one
from torch import Tensor

from moectl.routers.capacity import capacity
from moectl.routers.protocol import Context, Router


def queued(
    choices: list[list[int]], weights: list[list[float]], room: int, order: Sequence[int] | None = None
) -> Chosen:
    """Choices that find their expert full are -1, of weight 0: all first ones queue before any second one."""
    taken: dict[int, int] = {}
    for rank in range(len(choices[0])):
        for token in range(len(choices)) if order is None else order:
            expert = choices[token][rank]
            taken[expert] = taken.get(expert, 0) + 1
            if taken[expert] > room:
                choices[token][rank], weights[token][rank] = -1, 0.0
    return np.array(choices), np.array(weights)


def each(rule: Callable[[Router, Row], tuple[list[int], list[float]]]) -> Callable[..., Chosen]:
    """A reference of tokens that do not meet."""

    def reference(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
        index, weight = zip(*(rule(router, row.tolist()) for row in scores_TE), strict=True)
        return np.array(index), np.array(weight)

    return reference


def switch(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    T, E = scores_TE.shape
    choices = [best(row, 1) for row in scores_TE]
    weights = [[softmax(row)[choice[0]]] for row, choice in zip(scores_TE, choices, strict=True)]
    return queued(choices, weights, -int(-1.25 * T // E))


def over_their_sum(_router: Router, row: Row, k: int = 2) -> tuple[list[int], list[float]]:
    chosen = best(row, k)
    total = sum(math.exp(row[e]) for e in chosen)
    return chosen, [math.exp(row[e]) / total for e in chosen]


def plain(router: Router, row: Row) -> tuple[list[int], list[float]]:
    chosen = best(row, router.options.top_k)
    return chosen, [softmax(row)[e] for e in chosen]


def llama4(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    (chosen,) = best(row, 1)
    return [chosen], [sigmoid(row)[chosen]]


def gshard(factor: float) -> Callable[..., Chosen]:
    def reference(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
        pairs = [over_their_sum(router, row) for row in scores_TE]
        room = math.ceil(factor * len(scores_TE) / scores_TE.shape[1])
        index_TK, weight_TK = queued([pair[0] for pair in pairs], [pair[1] for pair in pairs], room)
        if getattr(router.options, "shared", False):
            weight_TK = np.array([[value / (sum(row) or 1) for value in row] for row in weight_TK])
        return index_TK, weight_TK

    return reference


def v_moe(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    T, E = scores_TE.shape
    pairs = [plain(router, row) for row in scores_TE]
    order = sorted(range(T), key=lambda t: (-max(softmax(scores_TE[t])), t))
    return queued([pair[0] for pair in pairs], [pair[1] for pair in pairs], math.ceil(1.05 * 2 * T / E), order)


def noisy_top_k(router: Router, hidden_TD: np.ndarray, _context: Context) -> Chosen:
    """In use: no noise."""
    weight_ED = router.weight.detach().double().numpy()
    pairs = [over_their_sum(router, [float(w_D @ x_D) for w_D in weight_ED], 4) for x_D in hidden_TD]
    return np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])


def gemma4(router: Router, hidden_TD: np.ndarray, _context: Context) -> Chosen:
    weight_ED = router.weight.detach().numpy()
    index, weight = [], []
    for x_D in hidden_TD:
        x_D = x_D / math.sqrt(sum(x_D**2) / len(x_D) + 1e-6) / math.sqrt(len(x_D))
        chosen, shares = over_their_sum(router, [float(w_D @ x_D) for w_D in weight_ED])
        index.append(chosen)
        weight.append(shares)
    return np.array(index), np.array(weight)


def in_groups(row: Row, groups: int, top_groups: int, score: Callable[[list[float]], float]) -> list[int]:
    """Experts of the best groups."""
    size = len(row) // groups
    worth = [score(sorted(row[g * size : (g + 1) * size])) for g in range(groups)]
    return [g * size + i for g in best(worth, top_groups) for i in range(size)]


def deepseek_v2(router: Router, row: Row) -> tuple[list[int], list[float]]:
    p = softmax(row)
    counted = {"max": 1, "top2": 2}[router.options.group_score]
    allowed = in_groups(p, 4, 2, lambda group: sum(group[-counted:]))
    chosen = best([p[e] if e in allowed else -1 for e in range(len(p))], 3)
    return chosen, [16 * p[e] for e in chosen]


def deepseek_v3(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    s = sigmoid(row)
    allowed = in_groups(s, 2, 1, lambda group: group[-1] + group[-2])
    chosen = best([s[e] if e in allowed else -1 for e in range(len(s))], 3)
    return chosen, [2.5 * s[e] / sum(s[c] for c in chosen) for e in chosen]


def loss_free(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    return best(row, 6), [sigmoid(row)[e] for e in best(row, 6)]


def inkling(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    s = sigmoid(row)
    chosen = [*best(s[:8], 2), 8, 9]
    return chosen, [8 * s[e] / sum(s[c] for c in chosen) for e in chosen]


def longcat(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    return best(row, 3), [6 * softmax(row)[e] for e in best(row, 3)]


def moe_plus_plus(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    chosen = best(row, 2)
    p = [0.0 if e == len(row) - 1 else softmax(row)[e] for e in chosen]
    return chosen, [value / sum(p) for value in p]


def zaya(router: Router, hidden_TD: np.ndarray, _context: Context) -> Chosen:
    values = {name: value.detach().numpy() for name, value in router.state_dict().items()}
    index, weight = [], []
    for x_D in hidden_TD:
        x_R = values["down_proj.weight"] @ x_D + values["down_proj.bias"]
        x_R = values["norm"] * x_R / math.sqrt(sum(x_R**2) / len(x_R) + 1e-5)
        for layer in ("fc1", "fc2"):
            x_R = values[f"{layer}.weight"] @ x_R + values[f"{layer}.bias"]
            x_R = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in x_R])
        p = softmax((values["out_proj.weight"] @ x_R).tolist())
        (chosen,) = best([p[e] + values["bias"][e] for e in range(9)], 1)
        index.append([-1 if chosen == 8 else chosen])
        weight.append([0.0 if chosen == 8 else p[chosen]])
    return np.array(index), np.array(weight)


def topology(router: Router, scores_TE: np.ndarray, _context: Context) -> Chosen:
    T, E = scores_TE.shape
    choices: list[list[int]] = [best(row, 2) for row in scores_TE]
    for node in range(2):
        here = [t for t in range(T) if t * 2 // T == node]
        leave = [t for t in here if best(scores_TE[t], 1)[0] * 2 // E != node]
        allowed = int(0.14 * len(here))
        if len(leave) < allowed:
            continue
        out = sorted(leave, key=lambda t: (-max(scores_TE[t]), t))[:allowed]
        for t in here:
            local = [value if e * 2 // E == node else -math.inf for e, value in enumerate(scores_TE[t])]
            choices[t] = [best(local, 1)[0], choices[t][0]] if t in out else best(local, 2)
    return np.array(choices), np.array([softmax([scores_TE[t][e] for e in choices[t]]) for t in range(T)])


def grin(_router: Router, row: Row) -> tuple[list[int], list[float]]:
    """In use; a threshold of a half, so that several experts share the softmax."""
    chosen: list[int] = []
    weight: list[float] = []
    for _ in range(2):
        left = [e for e in range(len(row)) if e not in chosen]
        largest = max(row[e] for e in left)
        near = [e for e in left if (largest - row[e]) / max(abs(row[e]), largest) <= 1.0]
        first = max(left, key=lambda e: (row[e], -e))
        chosen.append(first)
        weight.append(math.exp(row[first]) / sum(math.exp(row[e]) for e in near))
    return chosen, weight


def adds_to(total: float) -> Callable[[Tensor], Tensor]:
    return lambda sum_T: (sum_T - total).abs() < 1e-5 * total


def up_to(total: float) -> Callable[[Tensor], Tensor]:
    return lambda sum_T: (sum_T >= 0) & (sum_T <= total * (1 + 1e-6))


normalised = each(over_their_sum)
CASES = [
    Case("switch", switch, at_most_one, room=lambda tokens: capacity(tokens, 8, 1, 1.25)),
    Case("noisy-top-k", noisy_top_k, one, {"init": 0.25}),
    Case("gshard", gshard(2.0), one, room=lambda tokens: math.ceil(tokens / 4)),
    Case(
        "gshard",
        gshard(1.0),
        lambda sum_T: one(sum_T) | (sum_T == 0),
        {"shared": True, "eval_capacity_factor": 1.0, "capacity_factor": 1.0},
        room=lambda tokens: math.ceil(tokens / 8),
    ),
    Case("st-moe", gshard(2.0), one, room=lambda tokens: math.ceil(tokens / 4)),
    Case("v-moe", v_moe, at_most_one, room=lambda tokens: math.ceil(1.05 * tokens / 4)),
    Case("mixtral", normalised, one),
    Case("mixtral", each(plain), at_most_one, {"normalize": False, "z_loss": 0.001}),
    Case("olmoe", each(plain), at_most_one, {"top_k": 3}),
    Case("olmoe", normalised, one, {"top_k": 2, "normalize": True}),
    Case("gpt-oss", normalised, one, {"top_k": 2}),
    Case("llama4", each(llama4), at_most_one),
    Case("gemma4", gemma4, one, {"top_k": 2}),
    Case("inkling", each(inkling), adds_to(8), {"top_k": 2}, width=10, balance=None, why="shared experts take all"),
    Case("deepseek-moe", each(plain), at_most_one, {"top_k": 3, "groups": 4, "device_loss": 0.05}),
    Case("deepseek-v2", each(deepseek_v2), up_to(16), {"top_k": 3, "groups": 4, "top_groups": 2}),
    Case(
        "deepseek-v2",
        each(deepseek_v2),
        up_to(16),
        {"top_k": 3, "groups": 4, "top_groups": 2, "group_score": "top2"},
    ),
    Case("deepseek-v3", each(deepseek_v3), adds_to(2.5), {"top_k": 3, "groups": 2, "top_groups": 1, "aux_loss": 0.1}),
    Case("loss-free", each(loss_free), up_to(6)),
    Case("quantile", normalised, one),
    Case("minimax-01", gshard(2.0), one, {"capacity_factor": 1.0}, room=lambda tokens: math.ceil(tokens / 4)),
    Case("topology", topology, one),
    Case("longcat", each(longcat), up_to(6), {"top_k": 3, "zero_experts": 3}, width=11),
    Case("moe-plus-plus", each(moe_plus_plus), one, width=12),
    Case("zaya", zaya, at_most_one, {"router_size": 8}, balance=None, why="a random MLP has favourites"),
    Case("grin", each(grin), up_to(2), {"threshold": 0.5}, numerical=False, why="an estimator: test_draws.py"),
]
