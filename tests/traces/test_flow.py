"""Flow between layers and paths through them, against loops and routers whose answer is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from small_traces import firsts, trace, traces

from moectl.traces.flow import flow, paths
from moectl.traces.trace import RoutingTrace


@given(traces())
@settings(max_examples=60, deadline=None)
def test_flows_are_what_counting_gives(traced: RoutingTrace) -> None:
    found = flow(traced)
    assert len(found) == len(traced.layers) - 1
    for layer, got in enumerate(found):
        pairs = Counter(zip(firsts(traced, layer), firsts(traced, layer + 1), strict=True))
        pairs = {pair: number for pair, number in pairs.items() if min(pair) >= 0}
        for (i, j), number in np.ndenumerate(got.count_EE):
            assert number == pairs.get((i, j), 0)
        total = sum(pairs.values())
        information = 0.0
        for (i, j), number in pairs.items():
            source = sum(n for pair, n in pairs.items() if pair[0] == i)
            target = sum(n for pair, n in pairs.items() if pair[1] == j)
            information += number / total * math.log(number * total / (source * target))
        assert got.information == pytest.approx(information, abs=1e-12)
        assert got.value <= 1 + 1e-9


def test_flow_tells_a_table_from_chance() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 8, 5000)
    layers = np.stack([first, first // 2, generator.integers(0, 8, 5000)])[..., None]
    table, chance = flow(trace(layers, 8))
    assert table.value == pytest.approx(1) and table.information == pytest.approx(math.log(4), abs=0.01)
    assert chance.value == pytest.approx(0, abs=0.005) and chance.information > 0.001  # as counted


@given(traces())
@settings(max_examples=60, deadline=None)
def test_paths_are_what_counting_gives(traced: RoutingTrace) -> None:
    got = paths(traced)
    every = list(zip(*(firsts(traced, layer) for layer in range(len(traced.layers))), strict=True))
    counted = Counter(every)
    assert (got.tokens, got.distinct) == (len(every), len(counted))
    share = [number / len(every) for number in counted.values()]
    assert got.entropy == pytest.approx(-sum(part * math.log(part) for part in share), abs=1e-12)
    assert sorted(share, reverse=True)[:10] == pytest.approx([part for _, part in got.frequent])
    assert all(counted[path] / len(every) == pytest.approx(part) for path, part in got.frequent)
    domain_T = [traced.tokens.domains[domain] for domain in traced.tokens.domain_T]
    assert list(got.domains) == [name for name in traced.tokens.domains if name in domain_T]
    for a, one in enumerate(got.domains):
        for b, other in enumerate(got.domains):
            own = [
                Counter(p for p, name in zip(every, domain_T, strict=True) if name == which) for which in (one, other)
            ]
            divergence = 0.0
            for path in counted:
                p, q = (part[path] / sum(part.values()) for part in own)
                divergence += sum(x / 2 * math.log2(2 * x / (p + q)) for x in (p, q) if x)
            assert got.jsd_DD[a, b] == pytest.approx(divergence, abs=1e-12)
    assert ((got.null_DD >= 0) & (got.null_DD <= 1 + 1e-12)).all()


def test_divergence_is_1_for_paths_apart_and_that_of_a_deal_for_paths_alike() -> None:
    generator = np.random.default_rng(0)
    documents, length = 40, 50
    domain_N = [document % 2 for document in range(documents)]
    own = np.repeat(domain_N, length)
    alike = generator.integers(0, 4, (3, documents * length))
    described = {"lengths": [length] * documents, "domain_N": domain_N, "domains": ("a", "b")}
    apart = paths(trace((alike + 4 * own)[..., None], 8, **described))
    same = paths(trace(alike[..., None], 8, **described))
    assert apart.jsd_DD[0, 1] == pytest.approx(1) and apart.null_DD[0, 1] < 0.2
    assert same.jsd_DD[0, 1] == pytest.approx(same.null_DD[0, 1], abs=0.01)


def test_one_layer_flows_nowhere() -> None:
    assert flow(trace([[[0]]], 2)) == []
