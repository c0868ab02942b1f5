"""Every cell of the tables about loads against counting with lists, on ragged layers, one token, one expert, k = E."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import product
from math import ceil

import pytest
from ragged import ONE_TOKEN, TRACES, cells, chosen, experts_of, halved, layers_of, parts

from moectl.routing.whatif import capacity, dynamic, parallelism, placement, rectify
from moectl.traces.statistics import probabilities
from moectl.traces.trace import RoutingTrace


def places(convention: str, factor: float, tokens: int, buckets: int, top_k: int) -> int:
    if convention == "tutel":
        return top_k * int(factor * ceil(tokens / buckets))
    if convention == "megatron":
        return ceil(top_k * tokens / buckets * factor)
    return ceil(factor * top_k * tokens / buckets)


def all_places(convention: str, sizes: list[int], buckets: int, top_k: int, factor: float) -> list[int]:
    if convention == "hf-switch":
        return [int(factor)] * len(sizes)
    return [places(convention, factor, size, buckets, top_k) for size in sizes]


def queue(traced: RoutingTrace, layer: int, group: list[int], convention: str, bucket: list[int]) -> list[tuple]:
    """The assignments of one group (token, rank, bucket, weight) in the order in which they get places."""
    routed, experts = traced.layers[layer], experts_of(traced, layer)
    found = []
    for token in group:
        p = probabilities(routed.point, routed.score_TE[token : token + 1])[0, :experts]
        for rank, expert in enumerate(routed.index_TK[token].tolist()):
            if 0 <= expert < experts:
                weight = float(routed.weight_TK[token, rank])
                keys = {"megatron": (-weight, token, rank), "deepseek-v2": (-weight, token, rank)}
                keys["v-moe"] = (rank, -max(p), token)
                found.append((keys.get(convention, (rank, token)), token, bucket[expert], weight))
    return [(token, at, weight) for _, token, at, weight in sorted(found)]


def dropped(queues: list[list[tuple]], rooms: list[int]) -> tuple[list, list]:
    """All assignments, and those that find no place."""
    lost = []
    for line, room in zip(queues, rooms, strict=True):
        taken: dict[int, int] = {}
        for token, at, weight in line:
            taken[at] = taken.get(at, 0) + 1
            if taken[at] > room:
                lost.append((token, at, weight))
    return [each for line in queues for each in line], lost


@pytest.mark.parametrize("convention", ["switch", "tutel", "megatron", "v-moe", "hf-switch", "deepseek-v2"])
def test_capacity(convention: str) -> None:
    for traced, (group, factor) in product(
        (*TRACES[::2], ONE_TOKEN), (("batch", 1.25), ("sequence", 0.5), ("rank", 0.01))
    ):
        options = capacity.Options(convention, factor, 2, group, batch_tokens=16, gpus=3)
        documents = traced.tokens.document_T.tolist()
        size = {"batch": 16, "rank": 6}.get(group)
        by = documents if convention == "hf-switch" or size is None else [at // size for at in range(len(traced))]
        groups = [[at for at in range(len(traced)) if by[at] == one] for one in dict.fromkeys(by)]
        for layer, row in enumerate(layers_of(capacity.run(traced, options))):
            experts, top_k = experts_of(traced, layer), traced.layers[layer].point.top_k
            devices = min(3, experts) if convention == "deepseek-v2" else experts
            queues = [queue(traced, layer, group_, convention, parts(experts, devices)) for group_ in groups]

            rooms = partial(all_places, convention, [len(each) for each in groups], devices, top_k)
            room = rooms(2 if convention == "hf-switch" else factor)
            wanted, lost = dropped(queues, room)
            assert row["dropped"] == pytest.approx(len(lost) / max(len(wanted), 1))
            alone = [
                token
                for token in range(len(traced))
                if 0 < sum(each[0] == token for each in wanted) == sum(each[0] == token for each in lost)
            ]
            assert row["tokens left out"] == pytest.approx(len(alone) / len(traced))
            mass = sum(each[2] for each in wanted)
            assert row["weight lost"] == pytest.approx(sum(each[2] for each in lost) / max(mass, 1e-30), rel=1e-4)
            there = sum(room) * devices
            assert row["padding"] == pytest.approx((there - len(wanted) + len(lost)) / max(there, 1))
            step = 1 if convention == "hf-switch" else 100
            enough = row[f"{'places' if convention == 'hf-switch' else 'factor'} for under 1%"]
            assert len(dropped(queues, rooms(enough))[1]) < 0.01 * max(len(wanted), 1)
            assert enough == 1 / step or len(dropped(queues, rooms(enough - 1 / step))[1]) >= 0.01 * len(wanted)


@pytest.mark.parametrize(("factor", "fill", "gpus"), [(1.0, 1, 2), (0.3, 3, 8), (2.0, 0, 1), (0.001, 99, 5)])
def test_rectify(factor: float, fill: int, gpus: int) -> None:
    for traced in (*TRACES, ONE_TOKEN):
        found = layers_of(rectify.run(traced, rectify.Options(factor, 16, gpus, fill)))
        for layer, row in enumerate(found):
            routed, experts, top_k = traced.layers[layer], experts_of(traced, layer), traced.layers[layer].point.top_k
            home = parts(experts, min(gpus, experts))
            sums = dict.fromkeys(("wanted", "dropped", "rescued", "places", "filled", "mass", "kept", "after"), 0.0)
            for start in range(0, len(traced), 16):
                tokens = range(start, min(start + 16, len(traced)))
                p = probabilities(routed.point, routed.score_TE[tokens.start : tokens.stop])[:, :experts].tolist()
                room = ceil(factor * top_k * len(tokens) / experts)
                used, taken, lost = set(), [0] * experts, []
                for rank, token in product(range(top_k), tokens):
                    expert = int(routed.index_TK[token, rank])
                    if not 0 <= expert < experts:
                        continue
                    sums["wanted"] += 1
                    sums["mass"] += p[token - start][expert]
                    taken[expert] += 1
                    if taken[expert] <= room:
                        used.add((token, expert))
                    else:
                        lost.append(token)
                sums["dropped"] += len(lost)
                sums["kept"] += sum(p[token - start][expert] for token, expert in used)
                for token in lost:
                    own = (token - start) * min(gpus, experts) // len(tokens)
                    free = [e for e in range(experts) if home[e] == own and (token, e) not in used]
                    if free:
                        used.add((token, max(free, key=lambda e: (p[token - start][e], -e))))
                        sums["rescued"] += 1
                free_places = [room - min(count, room) for count in taken]
                order = {
                    token: sorted(
                        set(range(experts)) - set(chosen(traced, layer)[token]), key=lambda e: (-p[token - start][e], e)
                    )
                    for token in tokens
                }
                for turn in range(min(fill, experts - top_k)):
                    asks = [(-p[t - start][order[t][turn]], t, order[t][turn]) for t in tokens if turn < len(order[t])]
                    for _, token, expert in sorted(asks):
                        if free_places[expert] > 0 and (token, expert) not in used:
                            free_places[expert] -= 1
                            used.add((token, expert))
                            sums["filled"] += 1
                sums["places"] += room * experts
                sums["after"] += sum(p[token - start][expert] for token, expert in used)
            wanted, all_places = max(sums["wanted"], 1), max(sums["places"], 1)
            ran = sums["wanted"] - sums["dropped"]
            assert row["dropped"] == pytest.approx(sums["dropped"] / wanted)
            assert row["dropped after"] == pytest.approx((sums["dropped"] - sums["rescued"]) / wanted)
            assert row["padding"] == pytest.approx(1 - ran / all_places)
            assert row["padding after"] == pytest.approx(1 - (ran + sums["filled"]) / all_places)
            assert row["extra rows"] == pytest.approx(sums["rescued"] / all_places)
            assert row["scores kept"] == pytest.approx(sums["kept"] / (sums["mass"] or 1))
            assert row["scores kept after"] == pytest.approx(sums["after"] / sums["mass"] if sums["mass"] else 0)


def loads(picks: list[list[int]], experts: int, tokens: Iterable[int]) -> list[int]:
    count = Counter(expert for token in tokens for expert in picks[token])
    return [count[expert] for expert in range(experts)]


def uneven(level: list[float]) -> float:
    return max(level) / (sum(level) / len(level)) if sum(level) else 1.0


def on_gpus(load: list[int], home: list[int], gpus: int) -> list[float]:
    level = [0.0] * gpus
    for expert, gpu in enumerate(home):
        level[gpu] += load[expert]
    return level


def test_placement_without_copies() -> None:
    """Repacked: the heaviest first, to the lightest GPU that has room."""
    for traced, gpus in product(TRACES, (1, 2, 3, 50)):
        half = halved(traced)
        if len(traced) < 2:
            continue
        for layer, row in enumerate(layers_of(placement.run(traced, placement.Options(gpus, replicas=0)))):
            experts, picks = experts_of(traced, layer), chosen(traced, layer)
            fit, judge = (loads(picks, experts, [at for at in range(len(half)) if half[at] == one]) for one in (0, 1))
            stays = parts(experts, gpus)
            assert row["contiguous"] == pytest.approx(uneven(on_gpus(judge, stays, gpus)))
            room = [(experts + gpus - 1 - gpu) // gpus for gpu in range(gpus)]
            home, level = [0] * experts, [0.0] * gpus
            for expert in sorted(range(experts), key=lambda e: (-fit[e], e)):
                gpu = min((g for g in range(gpus) if room[g]), key=lambda g: (level[g], g))
                gpu = expert if experts <= gpus else gpu
                home[expert] = gpu
                level[gpu] += fit[expert]
                room[gpu] -= 1
            assert row["repacked"] == pytest.approx(uneven(on_gpus(judge, home, gpus)))
            least = max(1.0, max(judge) * gpus / max(sum(judge), 1))
            assert row["least without replicas"] == pytest.approx(least)
            assert min(row["contiguous"], row["repacked"]) >= least - 1e-9


def test_dynamic_policies_that_need_no_packing() -> None:
    for traced, gpus in product([each for each in TRACES if len(each) >= 8], (1, 2, 5)):
        found = dynamic.run(traced, dynamic.Options(gpus=gpus, replicas=0, batch_tokens=7))
        size = min(7, len(traced) // 8)
        batches = [list(range(at, at + size)) for at in range(0, len(traced) - size + 1, size)]
        stays, shadows = [], []
        for layer in range(len(traced.layers)):
            experts, picks = experts_of(traced, layer), chosen(traced, layer)
            home = parts(experts, gpus)
            for batch in batches[len(batches) // 2 :]:
                load = loads(picks, experts, batch)
                stays.append(uneven(on_gpus(load, home, gpus)))
                shadows.append(load)
        by_policy = {row["policy"]: row for row in cells(found)}
        assert by_policy["contiguous"]["largest load over the mean"] == pytest.approx(sum(stays) / len(stays))
        assert by_policy["contiguous"]["worst batch"] == pytest.approx(max(stays))
        assert by_policy["contiguous"]["experts moved a batch"] == 0
        assert by_policy["perfect"]["time over even"] >= 1 - 1e-9 or not any(map(sum, shadows))


def test_parallelism_token_by_token() -> None:
    """Ragged layers have as many ranks as the smallest has experts, and take the memory of all."""
    for traced, gpus, sharded in product([each for each in TRACES if len(each) >= 8], (1, 4), (True, False)):
        options = parallelism.Options(
            gpus=gpus, hidden_size=6, intermediate_size=4, value_bytes=2, tflops=1e-9, gb_per_s=1e-6, batch_tokens=8,
            memory_gb_per_s=1e-6, sharded=sharded, training=False,
        )  # fmt: skip
        layers = range(len(traced.layers))
        picks = [chosen(traced, layer) for layer in layers]
        for row in cells(parallelism.run(traced, options)):
            ranks, slices, copies = map(int, str(row["ranks x slices x copies"]).split(" x "))
            assert ranks <= min(experts_of(traced, layer) for layer in layers) and 4 % slices == 0
            batch = 8 // gpus * gpus
            compute, exchange, weights, gigabytes = [], [], [], 0.0
            for layer in layers:
                experts, times = experts_of(traced, layer), []
                home = parts(experts, ranks)
                mine = -(-experts // ranks) / slices * 3 * 6 * 4 * 2
                for start in range(0, len(traced) - batch + 1, batch):
                    share = batch // copies
                    largest = max(
                        max(on_gpus(loads(picks[layer], experts, range(at, at + share)), home, ranks))
                        for at in range(start, start + batch, share)
                    )
                    busy = max(largest * 2 * 72 / slices / 1e3, mine / 1e3)
                    sent = largest * (1 - 1 / ranks) if ranks > 1 else share * (1 - 1 / slices)
                    times.append((busy, 2 * sent * 12 / 1e3))
                compute.append(sum(each[0] for each in times) / len(times))
                exchange.append(sum(each[1] for each in times) / len(times))
                weights.append((1 - 1 / copies) * mine / 1e3 if sharded else 0.0)
                gigabytes += mine / (copies if sharded else 1) / 1e9
            for column, seconds in (("computing", compute), ("exchange", exchange), ("weights", weights)):
                assert row[f"{column} ms"] == pytest.approx(1e3 * sum(seconds) / len(seconds)), column
            assert row["GB of experts on a GPU"] == pytest.approx(gigabytes)
