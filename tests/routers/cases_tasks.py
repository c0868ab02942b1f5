"""Cases of routers that go by tasks, domains and modalities, and of those of attention's experts."""

from __future__ import annotations

import math

import numpy as np
import torch
from by_hand import best, sigmoid, softmax
from case import Case, at_most_one, one

from moectl.routers.protocol import Context, Router

TASKS, MODALITIES = 3, 2


def labels(tokens: int) -> Context:
    """Tokens of three tasks, two modalities and sentences of five tokens, all mixed."""
    order_T = torch.arange(tokens)
    return Context(
        generator=torch.Generator().manual_seed(0),
        task_T=order_T * 7 % TASKS,
        modality_T=order_T // 3 % MODALITIES,
        sequence_T=order_T // 5,
    )


def by_group(scores_TE: np.ndarray, group: list[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Top-k, renormalised, of the mean scores of the tokens of each token's group."""
    index, weight = [], []
    for own in group:
        members = [row for row, other in zip(scores_TE, group, strict=True) if other == own]
        mean = np.array([sum(column) / len(members) for column in zip(*members, strict=True)])
        chosen, probability = best(mean, top_k), softmax(mean)
        index.append(chosen)
        weight.append([probability[e] / sum(probability[f] for f in chosen) for e in chosen])
    return np.array(index), np.array(weight)


def task_level(router: Router, scores_TE: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    group = context.task_T if router.options.level == "task" else context.sequence_T
    assert group is not None
    return by_group(scores_TE, group.tolist(), 2)


def uni_perceiver(_router: Router, scores_TE: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    assert context.task_T is not None and context.modality_T is not None
    group = [z * 100 + m for z, m in zip(context.task_T.tolist(), context.modality_T.tolist(), strict=True)]
    return by_group(scores_TE, group, 2)


def own_gates(router: Router, hidden_TD: np.ndarray, context: Context) -> list[np.ndarray]:
    """Logits of each token under its task's gate."""
    assert context.task_T is not None
    weight_ZED = router.weight_ZED.detach().numpy()
    return [
        np.array([float(np.dot(weight_ZED[task, e], hidden)) for e in range(router.num_experts)])
        for hidden, task in zip(hidden_TD, context.task_T.tolist(), strict=True)
    ]


def mt_tag(router: Router, hidden_TD: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    index, weight = [], []
    for row in own_gates(router, hidden_TD, context):
        chosen = best(row, router.options.top_k)
        index.append(chosen)
        weight.append([softmax(row)[e] for e in chosen])
    return np.array(index), np.array(weight)


def demix(_router: Router, _scores_TE: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    assert context.task_T is not None
    return np.array([[task] for task in context.task_T.tolist()]), np.ones((len(context.task_T), 1))


def limoe(router: Router, scores_TE: np.ndarray, _context: Context) -> tuple[np.ndarray, np.ndarray]:
    """The most certain token first; a full expert turns tokens away."""
    T, E = scores_TE.shape
    room, taken = math.ceil(router.options.capacity_factor * T / E), [0] * E
    index, weight = np.full((T, 1), -1), np.zeros((T, 1))
    for token in sorted(range(T), key=lambda t: (-max(softmax(scores_TE[t])), t)):
        (expert,) = best(scores_TE[token], 1)
        if taken[expert] < room:
            taken[expert] += 1
            index[token], weight[token] = expert, softmax(scores_TE[token])[expert]
    return index, weight


def moa(router: Router, scores_TE: np.ndarray, _context: Context) -> tuple[np.ndarray, np.ndarray]:
    index, weight = [], []
    for row in scores_TE:
        chosen, probability = best(row, router.options.top_k), softmax(row)
        total = sum(probability[e] for e in chosen) if router.options.normalize else 1
        index.append(chosen)
        weight.append([probability[e] / total for e in chosen])
    return np.array(index), np.array(weight)


def switchhead(router: Router, hidden_TD: np.ndarray, _context: Context) -> tuple[np.ndarray, np.ndarray]:
    weight_SD, E = router.weight.detach().numpy(), router.num_experts
    index, weight = [], []
    for hidden in hidden_TD:
        chosen, value = [], []
        for head in range(router.options.heads):
            gates = sigmoid([np.dot(weight_SD[head * E + e], hidden) for e in range(E)])
            for e in best(gates, router.options.top_k):
                chosen.append(head * E + e)
                value.append(gates[e])
        index.append(chosen)
        weight.append(value)
    return np.array(index), np.array(weight)


FEW = {"tasks": TASKS}
PAIRS = FEW | {"modalities": MODALITIES}
BY_TASK = "tasks are spread over experts, not tokens"

CASES: list[Case] = [
    Case("task-level", task_level, one, FEW, labels, balance=None, why=BY_TASK),
    Case("task-level", task_level, one, FEW | {"level": "sentence"}, labels),
    Case("mt-tag", mt_tag, at_most_one, FEW, labels),
    Case("mt-tag", mt_tag, at_most_one, FEW | {"top_k": 3}, labels),
    Case("demix", demix, one, {}, labels, balance=None, why="the data say how many tokens a domain has"),
    Case("uni-perceiver", uni_perceiver, one, PAIRS, labels, balance=None, why=BY_TASK),
    Case("adamv-moe", mt_tag, at_most_one, FEW, labels),
    Case("adamv-moe", mt_tag, at_most_one, FEW | {"top_k": 2}, labels),
    Case("limoe", limoe, at_most_one, {}, labels, room=lambda tokens: math.ceil(1.05 * tokens / 8)),
    Case("limoe", limoe, at_most_one, {"capacity_factor": 0.5}, labels, room=lambda tokens: math.ceil(tokens / 16)),
    Case("moa", moa, one, {"top_k": 3}, numerical=False, why="no gradient goes through the sum of weights"),
    Case("moa", moa, at_most_one, {"top_k": 2, "normalize": False}),
    Case("switchhead", switchhead, None),
    Case("switchhead", switchhead, None, {"heads": 3, "top_k": 1}),
]
