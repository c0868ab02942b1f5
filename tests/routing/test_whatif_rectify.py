"""Rectify-Router against walking from token to token, and what a limit of nodes changes against sorting scores."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import home_of, random_trace, trace, traces

from moectl.errors import InputError, UsageError
from moectl.routers.deepseek_v2 import DeepSeekV2
from moectl.routers.deepseek_v3 import DeepSeekV3
from moectl.routers.protocol import Context, Router
from moectl.routers.rectify import Rectify
from moectl.routing.whatif import node_limit, rectify
from moectl.routing.whatif.limiting import limited
from moectl.routing.whatif.rectify import Rectified
from moectl.traces.statistics import probabilities
from moectl.traces.trace import Point


def walked(index: list[list[int]], p: list[list[float]], room: int, gpus: int, fill: int) -> Rectified:
    """One batch, by loops and lists."""
    T, K, E = len(index), len(index[0]), len(p[0])
    load, runs = [0] * E, [set() for _ in range(T)]
    missed = []
    for k in range(K):
        for t in range(T):
            expert = index[t][k]
            if expert >= 0:
                if load[expert] < room:
                    load[expert] += 1
                    runs[t].add(expert)
                else:
                    missed.append((k, t))
    wanted = [{expert for expert in row if expert >= 0} for row in index]
    kept = sum(p[t][e] for t in range(T) for e in runs[t])
    rescued = 0
    for _, t in missed:
        near = [e for e in range(E) if home_of(e, E, gpus) == t * gpus // T and e not in runs[t]]
        if near:
            runs[t].add(max(near, key=lambda e: (p[t][e], -e)))
            rescued += 1
    filled = 0
    ranked = [sorted(set(range(E)) - wanted[t], key=lambda e: (-p[t][e], e)) for t in range(T)]
    for place in range(min(fill, E - K)):
        asking = [(p[t][ranked[t][place]], -t) for t in range(T)]
        for _, negative in sorted(asking, reverse=True):
            t = -negative
            expert = ranked[t][place]
            if load[expert] < room and expert not in runs[t]:
                load[expert] += 1
                runs[t].add(expert)
                filled += 1
    mass = sum(p[t][e] for t in range(T) for e in wanted[t])
    after = sum(p[t][e] for t in range(T) for e in runs[t])
    of_domain = (np.array([number]) for number in (sum(map(len, wanted)), len(missed), rescued))
    return Rectified(*of_domain, room * E, filled, mass, kept, after)


@given(traces(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_rectifying_is_what_walking_gives(traced, room: int, gpus: int, fill: int) -> None:
    routed = traced.layers[0]
    p_TE = probabilities(routed.point, routed.score_TE)
    gpus = min(gpus, routed.point.num_experts)
    got = rectify.rectified(routed.index_TK, p_TE, np.zeros(len(traced), int), 1, room, gpus, fill)
    expected = walked(routed.index_TK.tolist(), p_TE.tolist(), room, gpus, fill)
    for name in Rectified.__slots__:
        assert getattr(got, name) == pytest.approx(getattr(expected, name)), name


def test_sums_over_batches_and_what_they_say() -> None:
    traced = random_trace(1, [40, 30], 6, 2, layers=1)
    options = rectify.Options(factor=0.8, batch_tokens=16, gpus=3)
    p_TE = probabilities(traced.layers[0].point, traced.layers[0].score_TE)
    parts = [
        walked(
            traced.layers[0].index_TK[at : at + 16].tolist(), p_TE[at : at + 16].tolist(), ceil(0.8 * 2 * n / 6), 3, 1
        )
        for at, n in zip(range(0, 70, 16), (16, 16, 16, 16, 6), strict=True)
    ]
    total = sum(parts[1:], parts[0])
    found = rectify.run(traced, options)
    row = dict(zip(found.columns, found.rows[0], strict=True))
    assert row["dropped"] == pytest.approx(int(total.dropped_D[0]) / int(total.wanted_D[0]))
    assert row["dropped after"] == pytest.approx(
        (int(total.dropped_D[0]) - int(total.rescued_D[0])) / int(total.wanted_D[0])
    )
    assert row["padding after"] == pytest.approx(
        1 - (int(total.wanted_D[0]) - int(total.dropped_D[0]) + total.filled) / total.places
    )
    assert row["extra rows"] == pytest.approx(int(total.rescued_D[0]) / total.places)
    assert row["scores kept after"] == pytest.approx(total.mass_after / total.mass)
    assert row["dropped after"] < row["dropped"] and row["padding after"] < row["padding"]
    assert found.detail["domains"] == {"a": {name: pytest.approx(row[name]) for name in ("dropped", "dropped after")}}
    whole = replace(options, batch_tokens=35)
    assert rectify.run(traced, whole).curves[0].lines["dropped"][1] == pytest.approx(
        rectify.run(traced, replace(whole, factor=1.0)).rows[-1][1]
    )


def test_random_scores_give_what_chance_says() -> None:
    score_TE = np.random.default_rng(5).gumbel(size=(8192, 16))
    index_TK = np.argsort(-score_TE.astype(np.float16), axis=1, kind="stable")[:, :2]
    traced = trace(index_TK[None], 16, score_LTE=score_TE[None])
    row = rectify.run(traced, rectify.Options(factor=1.0, batch_tokens=256)).rows[0]
    assert row[3] == pytest.approx(row[1], rel=0.15) and row[1] > 0.05
    row = node_limit.run(traced, node_limit.Options(nodes=4, limit=2)).rows[0]
    assert row[2] == pytest.approx(row[1], abs=0.02) and row[5] == pytest.approx(row[4], abs=0.02)


def sorted_out(p: list[float], K: int, nodes: int, limit: int, best_of: int) -> list[int]:
    """The choice of one token among the experts of its best nodes."""
    E = len(p)
    of = [[e for e in range(E) if e * nodes // E == node] for node in range(nodes)]
    score = [sum(sorted((p[e] for e in experts), reverse=True)[:best_of]) for experts in of]
    best = sorted(range(nodes), key=lambda node: (-score[node], node))[:limit]
    return sorted((e for node in best for e in of[node]), key=lambda e: (-p[e], e))[:K]


@given(traces(), st.integers(1, 6), st.sampled_from(["v2", "v3"]))
@settings(max_examples=150, deadline=None)
def test_a_limit_is_what_sorting_gives(traced, nodes: int, rule: str) -> None:
    routed = traced.layers[0]
    experts, K = routed.point.num_experts, routed.point.top_k
    nodes = min(nodes, experts)
    p_TE = probabilities(routed.point, routed.score_TE)
    best_of = node_limit.BEST_OF[rule]
    got = limited(p_TE, routed.index_TK, np.arange(experts) * nodes // experts, best_of)
    for limit in range(1, nodes + 1):
        changed, mass, met, agreed = 0, 0.0, 0, 0
        for token, p in enumerate(p_TE.tolist()):
            chosen, free = (sorted_out(p, K, nodes, each, best_of) for each in (limit, nodes))
            changed += len(set(free) - set(chosen))
            mass += sum(p[e] for e in chosen)
            met += len({e * nodes // experts for e in chosen})
            agreed += len(set(free) & set(routed.index_TK[token].tolist()))
        assert got.changed_M[limit - 1] == changed and got.nodes_M[limit - 1] == met
        assert got.mass_M[limit - 1] == pytest.approx(mass)
        assert got.agreed == agreed


@pytest.mark.parametrize(("rule", "router"), [("v3", DeepSeekV3), ("v2", DeepSeekV2)])
def test_a_limit_is_what_the_routers_do(rule: str, router: type[Router]) -> None:
    """Limits of one model's router, in use, on the same scores."""
    score_TE = torch.randn(100, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = Point("x", 0, 24, 5, score_kind="logits", scoring="sigmoid" if rule == "v3" else "softmax")
    p_TE = probabilities(point, score_TE.numpy())
    nobody_TK = np.full((100, 5), -1)
    sums = limited(p_TE, nobody_TK, np.arange(24) // 4, node_limit.BEST_OF[rule])
    chosen = {}
    for limit in (2, 4, 6):
        options = router.Options(top_k=5, groups=6, top_groups=limit)
        chosen[limit] = router(None, 24, options).route(score_TE, Context()).index_TK.numpy()
    for limit, index_TK in chosen.items():
        changed = sum(len({*free} - {*row}) for free, row in zip(chosen[6].tolist(), index_TK.tolist(), strict=True))
        assert sums.changed_M[limit - 1] == changed and (changed > 0) == (limit < 6)
        assert sums.mass_M[limit - 1] == pytest.approx(np.take_along_axis(p_TE, index_TK, 1).sum())


def test_without_a_limit_nothing_changes_and_the_rules_differ() -> None:
    score_TE = np.random.default_rng(0).normal(size=(200, 16))
    index_TK = np.argsort(-score_TE.astype(np.float16), axis=1, kind="stable")[:, :4]
    halves = {"lengths": [100, 100], "domain_N": [0, 1], "domains": ("a", "b")}
    traced = trace(index_TK[None], 16, score_LTE=score_TE[None], **halves)
    found = node_limit.run(traced, node_limit.Options(nodes=4, limit=4))
    assert found.rows[0][1] == found.rows[0][3] == 0 and found.detail["agreement with the trace"] == 1
    assert found.rows[0][4] == pytest.approx(np.mean([len(set(row // 4)) for row in index_TK]))
    v3, v2 = (node_limit.run(traced, node_limit.Options(4, 2, rule)) for rule in ("v3", "v2"))
    assert v3.rows[0][1] > 0 and v3.rows[0] != v2.rows[0] and set(v3.detail["domains"]) == {"a", "b"}
    changed = v3.curves[0].lines["choices changed"]
    assert changed[1] == pytest.approx(v3.rows[0][1]) and changed[-1] == 0 and changed[0] > changed[1]


def test_what_cannot_be_asked_is_refused() -> None:
    traced = random_trace(0, [9], 6, 3)
    with pytest.raises(InputError, match="no scores"):
        rectify.run(trace(np.zeros((1, 4, 1)), 2), rectify.Options())
    with pytest.raises(UsageError, match="8 nodes"):
        node_limit.run(traced, node_limit.Options())
    with pytest.raises(UsageError, match="fewer experts"):
        node_limit.run(traced, node_limit.Options(nodes=6, limit=2))
    assert node_limit.run(traced, node_limit.Options(nodes=6, limit=3)).curves[0].lines["scores lost"][:2] == [
        None,
        None,
    ]
    for wrong in ({"rule": "v1"}, {"limit": 9}):
        with pytest.raises(UsageError):
            node_limit.Options(**wrong)


@given(
    st.integers(0, 99),
    st.sampled_from([(8, 2, 4), (6, 1, 3), (4, 4, 2)]),
    st.integers(0, 2),
    st.sampled_from([0.5, 1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_rectified_is_what_the_router_does(
    seed: int, shape: tuple[int, int, int], fill: int, factor: float
) -> None:
    """`moectl.routers.rectify` is written in torch, for training, and counts nothing; both follow the same rule."""
    (experts, top_k, gpus), tokens = shape, 24
    score_TE = torch.from_numpy(np.random.default_rng(seed).normal(size=(tokens, experts)) + np.arange(experts) / 2)
    options = Rectify.Options(top_k=top_k, capacity_factor=factor, groups=gpus, fill=fill)
    routed = Rectify(None, experts, options).route(score_TE, Context())
    p_TE = score_TE.softmax(-1).numpy()
    index_TK, room = np.argsort(-p_TE, axis=1)[:, :top_k], ceil(factor * top_k * tokens / experts)
    got = rectify.rectified(index_TK, p_TE, np.zeros(tokens, np.int64), 1, room, gpus, fill)
    assert int(got.dropped_D[0] - got.rescued_D[0]) == int(routed.dropped_TK.sum())
    runs_TJ = routed.index_TK.numpy()
    assert got.filled == (runs_TJ[:, top_k:] >= 0).sum()
    there_TJ = runs_TJ >= 0
    assert got.mass_after == pytest.approx(np.take_along_axis(p_TE, runs_TJ.clip(0), 1)[there_TJ].sum())
