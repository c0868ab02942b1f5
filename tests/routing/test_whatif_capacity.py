"""Capacity against a model that really drops and against counting one by one; chance against all routings there are."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations, product
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_traces import home_of, random_trace, trace, traces
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moectl.errors import InputError, UsageError
from moectl.routers import capacity as rooms
from moectl.routers.deepseek_v2 import DeepSeekV2, DeepSeekV2Options
from moectl.routers.protocol import Context
from moectl.routing.capture import Capture
from moectl.routing.whatif.capacity import FEW, Options, run
from moectl.routing.whatif.chance import choices, groups_met, overflow
from moectl.routing.whatif.conventions import CONVENTIONS, kept, queued
from moectl.routing.whatif.queues import by_rank, groups, places
from moectl.traces.trace import Point, Routed, RoutingTrace


def test_a_switch_that_drops_is_reproduced_row_by_row() -> None:
    """Sequences of several lengths through encoder and decoder; who had a place, and how many rows each expert ran."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=8,
        num_heads=2,
        num_experts=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        expert_capacity=4,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    lengths, rows_run, wanted = [19, 5, 30], Counter(), defaultdict(list)
    with Capture(model, scores=False) as capture:
        names = [tap.point.name for tap in capture.taps]
        for name in names:
            experts, router = model.get_submodule(name), model.get_submodule(name.replace("experts", "router"))
            router.classifier.register_forward_hook(
                lambda module, inputs, logits, name=name: wanted[name].append(logits.argmax(-1).flatten())
            )
            for expert in range(4):
                experts[f"expert_{expert}"].register_forward_hook(
                    lambda module, inputs, output, key=(name, expert): rows_run.update({key: len(inputs[0])})
                )
        seen = []
        for length in lengths:
            ids = torch.randint(1, 50, (1, length))
            with torch.no_grad():
                model(input_ids=ids, decoder_input_ids=ids)
            seen.append(capture.take())
    assert len(names) == 4
    dropped = 0
    for number, tap in enumerate(capture.taps):
        wanted_T1 = torch.cat(wanted[tap.point.name])[:, None].numpy()
        executed_T = torch.cat([each[number].index_TK[:, 0] for each in seen]).numpy()
        traced = trace(wanted_T1[None], 4, lengths=lengths)
        options = Options(convention="hf-switch", expert_capacity=4)
        of = groups(traced.tokens, options.group_tokens)
        kept_T = kept(queued(traced.layers[0], of, options), of, options)[:, 0]
        assert np.where(kept_T, wanted_T1[:, 0], -1).tolist() == executed_T.tolist()
        assert [int((wanted_T1[kept_T, 0] == expert).sum()) for expert in range(4)] == [
            rows_run[tap.point.name, expert] for expert in range(4)
        ]
        assert run(traced, options).rows[0][1] == pytest.approx((executed_T < 0).mean())
        dropped += int((executed_T < 0).sum())
        one_more = Options(convention="hf-switch", expert_capacity=5)
        assert kept(queued(traced.layers[0], of, one_more), of, one_more).sum() > kept_T.sum()
    assert dropped > 20


def one_by_one(traced: RoutingTrace, layer: int, options: Options) -> list[list[bool]]:
    """Who has a place, by walking through queues of Python lists."""
    routed, tokens = traced.layers[layer], traced.tokens
    index, K, E = routed.index_TK.tolist(), routed.point.top_k, routed.point.num_experts
    size = {"batch": options.batch_tokens, "rank": ceil(options.batch_tokens / options.gpus)}.get(options.group)
    by_document = options.convention == "hf-switch" or options.group == "sequence"
    found = [[False] * K for _ in index]
    keys = [int(tokens.document_T[token]) if by_document else token // size for token in range(len(index))]
    for key in set(keys):
        members = [token for token in range(len(index)) if keys[token] == key]
        weight = {(t, k): abs(float(routed.weight_TK[t, k])) for t in members for k in range(K)}
        queue = [(t, k) for k in range(K) for t in members]
        if options.convention == "v-moe":
            z = {t: routed.score_TE[t].astype(float) for t in members}
            first = {t: 1 / np.exp(z[t] - z[t].max()).sum() for t in members}  # so that equals are equal to the bit
            queue.sort(key=lambda at: (at[1], -first[at[0]], at[0]))
        if options.convention in ("megatron", "deepseek-v2"):
            queue.sort(key=lambda at: (-weight[at] if index[at[0]][at[1]] >= 0 else 0, at))
        n, cf = len(members), options.factor
        devices = min(options.gpus, E)
        room = {
            "tutel": K * int(cf * ceil(n / E)),
            "hf-switch": options.expert_capacity,
            "deepseek-v2": ceil(cf * K * n / devices),
            "megatron": ceil(K * n / E * cf),
        }.get(options.convention, ceil(cf * K * n / E))
        taken = Counter()
        for t, k in queue:
            expert = index[t][k]
            if expert >= 0:
                place = home_of(expert, E, devices) if options.convention == "deepseek-v2" else expert
                found[t][k] = taken[place] < room
                taken[place] += found[t][k]
    return found


@given(
    traces(),
    st.sampled_from([name for name in CONVENTIONS if name != "gshard"]),
    st.sampled_from(["batch", "rank", "sequence"]),
    st.sampled_from([0.3, 0.75, 1.0, 1.25]),
    st.integers(1, 9),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_places_are_what_standing_in_line_gives(
    traced: RoutingTrace, convention: str, group: str, factor: float, batch: int, gpus: int
) -> None:
    """Where equal weights meet, the earlier token and then the higher rank goes first."""
    if convention == "v-moe" and traced.layers[0].point.score_kind != "logits":
        return
    if traced.layers[0].point.scoring != "softmax":
        return
    options = Options(convention, factor, 2, group, batch, gpus)
    of = groups(traced.tokens, options.group_tokens)
    found = run(traced, options)
    for layer, routed in enumerate(traced.layers):
        queue = queued(routed, of, options)
        got_TK, expected_TK = kept(queue, of, options), np.array(one_by_one(traced, layer, options))
        assert got_TK.tolist() == expected_TK.tolist()
        wanted_TK = routed.index_TK >= 0
        lost_TK = wanted_TK & ~expected_TK
        weight_TK = routed.weight_TK.astype(float)
        row = found.rows[layer]
        assert row[1] == pytest.approx(lost_TK.sum() / max(wanted_TK.sum(), 1))
        assert row[3] == pytest.approx(np.mean(wanted_TK.any(1) & (lost_TK == wanted_TK).all(1)))
        assert row[4] == pytest.approx(weight_TK[lost_TK].sum() / max(weight_TK[wanted_TK].sum(), 1e-30))


@given(traces(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_queue_is_the_one_that_routers_have(traced: RoutingTrace, prioritised: bool) -> None:
    """In one group, first choices first, with and without a priority; a queue by tokens would be another."""
    routed = traced.layers[0]
    priority_T = np.arange(len(traced)) * 7 % 5 if prioritised else None
    index_TK, E = routed.index_TK.astype(np.int64), routed.point.num_experts
    of = groups(traced.tokens, 10**6)
    got_TK, _ = places(index_TK, by_rank(of, routed.point.top_k, priority_T), of, E)
    priority = None if priority_T is None else torch.from_numpy(priority_T)
    assert got_TK.tolist() == rooms.places(torch.from_numpy(index_TK), E, priority).tolist()


def test_a_queue_in_which_second_choices_wait_no_longer_is_seen() -> None:
    index_TK = np.array([[0, 1], [1, 0], [1, 2]])
    of = groups(trace(index_TK[None], 3).tokens, 8)
    assert places(index_TK, by_rank(of, 2), of, 3)[0].tolist() == [[0, 2], [0, 1], [1, 0]]
    assert places(index_TK, np.arange(6), of, 3)[0].tolist() == [[0, 0], [1, 1], [2, 0]]


def test_gshard_sends_a_second_choice_with_twice_its_share() -> None:
    index_TK = np.tile([0, 1], (20_000, 1))
    traced = trace(index_TK[None], 4, weight_LTK=np.tile([0.6, 0.2], (1, 20_000, 1)))
    options = Options(convention="gshard", factor=8)
    queue = queued(traced.layers[0], groups(traced.tokens, 4096), options)
    assert (queue.bucket_TK[:, 0] == 0).all()
    assert (queue.bucket_TK[:, 1] == 1).mean() == pytest.approx(2 * 0.25, abs=0.02)
    even = trace(index_TK[None, :50], 4, weight_LTK=np.tile([0.5, 0.5], (1, 50, 1)))
    assert (queued(even.layers[0], groups(even.tokens, 4096), options).bucket_TK[:, 1] == 1).all()
    with pytest.raises(InputError, match="3 experts"):
        run(random_trace(0, [9], 3, 3), options)


def test_deepseek_v2_drops_what_its_router_does_in_training() -> None:
    """50 sequences of two tokens, on 4 devices."""
    router = DeepSeekV2(None, 16, DeepSeekV2Options(top_k=3, groups=4, top_groups=2, scale=1.0))
    scores_TE = torch.randn(100, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(1, 0, 16)
    routed = router.route(scores_TE, Context())
    sequence_T = torch.arange(50).repeat_interleave(2)
    dropped_TK = router.route(scores_TE, Context(training=True, sequence_T=sequence_T)).dropped_TK.numpy()
    traced = trace(routed.index_TK[None].numpy(), 16, weight_LTK=routed.weight_TK[None].numpy())
    options = Options(convention="deepseek-v2", factor=1.0, gpus=4)
    of = groups(traced.tokens, options.group_tokens)
    assert (kept(queued(traced.layers[0], of, options), of, options) == ~dropped_TK).all() and dropped_TK.sum() > 20


@pytest.mark.parametrize(("size", "share_J"), [(1, (0, 0, 1)), (2, (0, 0, 1)), (1, (0.25, 0.25, 0.5))])
def test_chance_is_the_mean_over_all_routings(size: int, share_J: tuple[float, ...]) -> None:
    """Three tokens choose 0, 1 or 2 of 4 experts: every way, with how likely it is."""
    ways = [
        (chosen, share / len(list(combinations(range(4), number))))
        for number, share in enumerate(share_J)
        for chosen in combinations(range(4), number)
    ]
    for room in range(7):
        expected = 0.0
        for three in product(ways, repeat=3):
            load = sum(expert < size for chosen, _ in three for expert in chosen)
            expected += max(0, load - room) * np.prod([likely for _, likely in three])
        assert overflow(4, size, share_J, 3, room) == pytest.approx(expected, abs=1e-12)
    met = sum(likely * any(expert < size for expert in chosen) for chosen, likely in ways)
    assert groups_met(4, [size], share_J) == pytest.approx(met)


@pytest.mark.parametrize("convention", ["switch", "deepseek-v2", "hf-switch"])
def test_random_routing_drops_what_chance_says(convention: str) -> None:
    traced = many(0.0)
    [row, *_] = run(traced, Options(convention=convention, factor=1.0, expert_capacity=32, batch_tokens=64)).rows
    assert row[2] == pytest.approx(row[1], rel=0.08) and row[1] > 0.01
    assert choices(traced.layers[0].index_TK) == (0, 0, 1)


def test_the_smallest_factor_is_where_drops_fall_below_one_percent() -> None:
    traced = many(1.0)
    [row, *_] = run(traced, Options()).rows
    for factor, few in ((row[6], True), (row[6] - 0.01, False)):
        assert (run(traced, Options(factor=factor)).rows[0][1] < FEW) == few
    curve = run(traced, Options()).curves[0]
    at = curve.x.index(1.25)
    assert curve.lines["dropped"][at] == pytest.approx(row[1])
    assert curve.lines["padding"][at] == pytest.approx(row[5])
    assert list(curve.lines["dropped"]) == sorted(curve.lines["dropped"], reverse=True)


def test_the_last_of_a_group_are_dropped_unless_queues_have_priorities() -> None:
    traced = many(2.0)
    last = run(traced, Options(factor=1.0)).curves[1].lines["dropped"]
    assert last[-1] > last[0] + 0.2
    flat = run(traced, Options(convention="v-moe", factor=1.0)).curves[1].lines["dropped"]
    assert max(flat) - min(flat) < 0.1


def test_domains_are_told_apart_and_experts_that_compute_nothing_have_room() -> None:
    traced = trace(np.zeros((1, 8, 1)), 2, lengths=[4, 4], domain_N=[0, 1], domains=("a", "b"))
    found = run(traced, Options(factor=1.0))
    assert found.detail["domains"] == {"a": 0.0, "b": 1.0} and "b loses 100.0%" in found.headline
    [routed] = traced.layers
    point = Point("x", 0, 2, 1, null_experts=1)
    nothing = RoutingTrace(traced.tokens, (Routed(point, np.ones((8, 1), np.int16)),))
    assert routed.index_TK.max() == 0 and run(nothing, Options(factor=0.1)).rows[0][1] == 0


def test_what_a_trace_lacks_is_said() -> None:
    bare = trace(np.zeros((1, 4, 1)), 2)
    with pytest.raises(InputError, match="no weights"):
        run(bare, Options(convention="megatron"))
    with pytest.raises(InputError, match="no tokens"):
        run(trace(np.zeros((1, 0, 1)), 2), Options())
    for wrong in ({"convention": "first"}, {"group": "all"}, {"factor": 0}):
        with pytest.raises(UsageError):
            Options(**wrong)


def many(skew: float) -> RoutingTrace:
    """Two of 8 experts for 8192 tokens, the low numbers favoured."""
    generator = np.random.default_rng(0)
    score_TE = generator.gumbel(size=(8192, 8)) - skew * np.arange(8) / 4
    index_TK = np.argsort(-score_TE, axis=1)[:, :2]
    chosen_TK = np.exp(np.take_along_axis(score_TE, index_TK, 1))
    weight_TK = chosen_TK / chosen_TK.sum(1, keepdims=True)
    return trace(index_TK[None], 8, lengths=[128] * 64, weight_LTK=weight_TK[None], score_LTE=score_TE[None])
