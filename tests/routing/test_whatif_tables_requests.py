"""Every cell of the tables about requests, traffic and pruning against counting with lists, on ragged layers too."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import comb

import numpy as np
import pytest
from ragged import ONE_TOKEN, TRACES, cells, chosen, experts_of, halved, layers_of, parts

from moectl.routing.whatif import all_to_all, cache, coalescing, node_limit, offload, prefetch, pruning
from moectl.traces.statistics import probabilities


def held_by(policy: str, steps: list[list[int]], size: int) -> int:
    """Hits of a cache of one layer, with a set; a step's experts are asked for before any comes in, and all stay."""
    inside: dict[int, tuple] = {}
    asked: Counter[int] = Counter()
    hits = 0
    for now, step in enumerate(steps):
        step = list(dict.fromkeys(step))
        hits += sum(expert in inside for expert in step)
        for at, expert in enumerate(step):
            asked[expert] += 1
            inside[expert] = (now, at)
        while len(inside) > size:
            leave = [expert for expert in inside if expert not in step]
            if policy == "LRU":
                out = min(leave, key=lambda expert: inside[expert])
            elif policy == "LFU":
                out = min(leave, key=lambda expert: (asked[expert], inside[expert]))
            else:
                later = {expert: [at for at in range(now + 1, len(steps)) if expert in steps[at]] for expert in leave}
                out = max(leave, key=lambda expert: later[expert][0] if later[expert] else len(steps))
            del inside[out]
    return hits


def test_cache() -> None:
    for traced in (*TRACES, ONE_TOKEN):
        options = cache.Options(expert_mb=3, gb_per_s=2, dense_ms=7, target=0.5)
        found = cache.run(traced, options)
        layers = range(len(traced.layers))
        steps = [chosen(traced, layer) for layer in layers]
        asked = sum(len(set(step)) for layer in layers for step in steps[layer])
        half = halved(traced)
        for row in cells(found):
            size, policy = int(row["experts held"]), row["policy"]
            hits, of = 0, asked
            if policy == "static":
                of = 0
                for layer in layers:
                    busy = Counter(e for at, step in enumerate(steps[layer]) if not half[at] for e in step)
                    best = sorted(range(experts_of(traced, layer)), key=lambda e: (-busy[e], e))[:size]
                    judged = [e for at, step in enumerate(steps[layer]) if half[at] for e in step]
                    hits, of = hits + sum(e in best for e in judged), of + len(judged)
            elif policy in ("LRU", "LFU", "Belady"):
                hits = sum(held_by(policy, steps[layer], size) for layer in layers)
            else:
                continue
            assert row["hit rate"] == pytest.approx(hits / max(of, 1)), policy
            missed = asked / len(traced) * (1 - hits / max(of, 1))
            assert row["misses/token"] == pytest.approx(missed)
            assert row["MB/token"] == pytest.approx(3 * missed)
            assert row["tokens/s"] == pytest.approx(1e3 / (7 + 3 * missed / 2))
            assert row["GB"] == pytest.approx(sum(min(size, experts_of(traced, layer)) for layer in layers) * 3e-3)
            assert row["beyond it"] == pytest.approx(row["hit rate"] - row["random"])


def test_prefetch() -> None:
    for traced, ahead in product(TRACES, (0, 2, 99)):
        if len(traced.layers) < 2:
            continue
        half = halved(traced)
        for layer, row in enumerate(layers_of(prefetch.run(traced, prefetch.Options(ahead))), start=1):
            now, then, experts = chosen(traced, layer - 1), chosen(traced, layer), experts_of(traced, layer)
            fetched = ahead or min(traced.layers[layer].point.top_k, experts)
            assert row["fetched"] == fetched and row["random"] == pytest.approx(min(fetched / experts, 1))
            busy = Counter(e for at in range(len(traced)) if not half[at] for e in then[at])
            fitted = [at for at in range(len(traced)) if not half[at]]
            pairs = Counter((e, f) for at in fitted for e in now[at] for f in then[at])
            seen = Counter(e for at in fitted for e in now[at])
            hits, chained, came = 0, 0, 0
            for at in range(len(traced)):
                if not half[at]:
                    continue
                score = [
                    sum(pairs[e, f] / seen[e] if seen[e] else busy[f] / max(len(fitted), 1) for e in now[at])
                    for f in range(experts)
                ]
                popular = sorted(range(experts), key=lambda f: (-busy[f], f))
                likely = sorted(popular, key=lambda f: -round(score[f], 12))
                hits += sum(f in popular[:fetched] for f in then[at])
                chained += sum(f in likely[:fetched] for f in then[at])
                came += len(then[at])
            assert row["popularity"] == pytest.approx(hits / max(came, 1))
            assert row["Markov"] == pytest.approx(chained / max(came, 1))
            assert 0 <= row["MoE-Infinity"] <= 1


def batched(documents: list[int], size: int) -> list[list[int]]:
    found: list[list[int]] = []
    for at, document in enumerate(documents):
        if not at or documents[at - 1] != document or len(found[-1]) == size:
            found.append([])
        found[-1].append(at)
    return found


@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
def test_offload(resident: float) -> None:
    options = offload.Options(5, resident, cpu_us_per_token=4, expert_mb=1, gb_per_s=100)  # 10 us to fetch
    for traced in TRACES[::2]:
        half, layers = halved(traced), range(len(traced.layers))
        if not any(half):
            continue
        counted = {
            (layer, expert): sum(expert in step for at, step in enumerate(chosen(traced, layer)) if not half[at])
            for layer in layers
            for expert in range(experts_of(traced, layer))
        }
        pinned = sorted(counted, key=lambda key: (-counted[key], *key))[: round(resident * len(counted))]
        late = [at for at in range(len(traced)) if half[at]]
        for row in cells(offload.run(traced, options)):
            groups = batched([int(traced.tokens.document_T[at]) for at in late], int(row["batch"]))
            taken, fetch, cpu, best, longer, left, made = 0, 0.0, 0.0, 0.0, 0.0, 0, 0
            for layer, group in product(layers, groups):
                count = Counter(e for at in group for e in chosen(traced, layer)[late[at]])
                taken, made = taken + len(count), made + count.total()
                missing = [count[e] for e in count if (layer, e) not in pinned]
                fetch, cpu = fetch + 10 * len(missing), cpu + 4 * sum(missing)
                best += sum(min(10, 4 * each) for each in missing)
                left += sum(each for each in missing if 4 * each < 10)
                splits = product((True, False), repeat=len(missing))
                longer += min(
                    max(10 * sum(split), 4 * sum(each for each, there in zip(missing, split, strict=True) if not there))
                    for split in splits
                )
            assert row["experts/layer"] == pytest.approx(taken / len(groups) / len(layers))
            for column, us in (("fetch", fetch), ("CPU", cpu), ("Fiddler", best), ("longer side", longer)):
                assert row[f"{column} ms/token"] == pytest.approx(us / 1e3 / len(late)), column
            assert row["on the CPU"] == pytest.approx(left / max(made, 1))


@pytest.mark.parametrize(("gpus", "each"), [(4, 2), (6, 6), (12, 3), (1, 1)])
def test_all_to_all(gpus: int, each: int) -> None:
    for traced, home in product((*TRACES, ONE_TOKEN), ("document", "round-robin")):
        options = all_to_all.Options(gpus, each, hidden_size=500, bytes_per_value=1, home=home)
        for layer, row in enumerate(layers_of(all_to_all.run(traced, options))):
            place, sums = parts(experts_of(traced, layer), gpus), Counter[str]()
            for at, step in enumerate(chosen(traced, layer)):
                own = (int(traced.tokens.document_T[at]) if home == "document" else at) % gpus
                on = [place[expert] for expert in step]
                sums += Counter(
                    gpus=len(set(on)),
                    nodes=len({gpu // each for gpu in on}),
                    other_gpus=len(set(on) - {own}),
                    other_nodes=len({gpu // each for gpu in on} - {own // each}),
                    copies_gpus=sum(gpu != own for gpu in on),
                    copies_nodes=sum(gpu // each != own // each for gpu in on),
                )
            expected = {
                "nodes": "nodes", "GPUs": "gpus", "kB to other nodes": "other_nodes", "kB to other GPUs": "other_gpus",
                "with a copy per expert": "copies_nodes", "GPUs, a copy per expert": "copies_gpus",
            }  # fmt: skip
            for column, name in expected.items():
                scale = 0.5 if "kB" in column or "copy" in column else 1
                assert row[column] == pytest.approx(scale * sums[name] / len(traced)), column
            experts, met = experts_of(traced, layer), 0.0
            for step in chosen(traced, layer):
                for gpu in set(place):
                    missed = comb(experts - place.count(gpu), len(step)) / comb(experts, len(step))
                    met += 1 - missed
            assert row["GPUs by chance"] == pytest.approx(met / len(traced))


@pytest.mark.parametrize("rule", ["v3", "v2"])
def test_node_limit(rule: str) -> None:
    for traced in [each for each in TRACES if min(experts_of(each, layer) for layer in range(len(each.layers))) > 3]:
        for nodes, limit in ((2, 2), (3, 0), (4, 3)):
            options = node_limit.Options(nodes, limit, rule)
            top = [each.point.top_k for each in traced.layers]
            sizes = [sorted(Counter(parts(experts_of(traced, at), nodes)).values()) for at in range(len(top))]
            least = [
                next(n for n in range(1, nodes + 1) if sum(size[:n]) >= min(k, sum(size)))
                for k, size in zip(top, sizes, strict=True)
            ]
            asked = limit or max(nodes // 2, *least)
            if asked < max(least):
                continue
            for layer, row in enumerate(layers_of(node_limit.run(traced, options))):
                routed, experts = traced.layers[layer], experts_of(traced, layer)
                home, made, changed, lost, mass, met, free = parts(experts, nodes), 0, 0, 0.0, 0.0, 0, 0
                for token in range(len(traced)):
                    p = probabilities(routed.point, routed.score_TE[token : token + 1])[0, :experts].tolist()
                    ranked = sorted(range(experts), key=lambda e: (-p[e], e))
                    best = ranked[: top[layer]]
                    worth = [
                        sum(
                            sorted((p[e] for e in range(experts) if home[e] == node), reverse=True)[
                                : 2 - (rule == "v2")
                            ]
                        )
                        for node in range(nodes)
                    ]
                    kept = sorted(range(nodes), key=lambda node: (-worth[node], node))[:asked]
                    again = [e for e in ranked if home[e] in kept][: top[layer]]
                    made, changed = made + top[layer], changed + len(set(best) - set(again))
                    mass, lost = mass + sum(p[e] for e in best), lost + sum(p[e] for e in again)
                    met, free = met + len({home[e] for e in again}), free + len({home[e] for e in best})
                assert row["choices changed"] == pytest.approx(changed / made)
                assert row["scores lost"] == pytest.approx(1 - lost / mass, abs=1e-9)
                assert row["nodes"] == pytest.approx(met / len(traced))
                assert row["nodes without a limit"] == pytest.approx(free / len(traced))


@pytest.mark.parametrize(("removed", "by", "beta"), [(0.25, "weight", 0), (0.0, "count", 0.5), (0.99, "count", 3)])
def test_pruning(removed: float, by: str, beta: float) -> None:
    for traced in (*TRACES, ONE_TOKEN):
        for layer, row in enumerate(layers_of(pruning.run(traced, pruning.Options(removed, by, beta)))):
            experts, steps = experts_of(traced, layer), chosen(traced, layer)
            number = round(removed * experts)
            mass = np.zeros((2, experts))
            ratios, sorted_weights = [], []
            for at, row_K in enumerate(traced.layers[layer].index_TK.tolist()):
                here = [
                    (float(traced.layers[layer].weight_TK[at, k]), e) for k, e in enumerate(row_K) if 0 <= e < experts
                ]
                for weight, expert in here:
                    mass[traced.tokens.domain_T[at], expert] += weight if by == "weight" else 1
                sorted_weights.append(sorted((weight for weight, _ in here), reverse=True))
                ratios += [each / sorted_weights[-1][0] for each in sorted_weights[-1][1:]]
            gone = sorted(range(experts), key=lambda e: (mass[:, e].sum(), e))[:number]
            assert row["removed"] == number and row["random experts"] == pytest.approx(number / experts)
            assert row["mass lost"] == pytest.approx(mass[:, gone].sum() / max(mass.sum(), 1e-300))
            lost = [len(set(step) & set(gone)) for step in steps]
            assert row["tokens losing some"] == pytest.approx(sum(each > 0 for each in lost) / len(steps))
            every = [each for each, step in zip(lost, steps, strict=True) if step and each == len(step)]
            assert row["tokens losing all"] == pytest.approx(len(every) / len(steps))
            if traced.layers[layer].point.top_k > 1 and ratios:
                bound = beta or float(np.median(np.array(ratios, np.float32)))
                weak = [
                    (w, w / each[0]) for each in sorted_weights for w in each[1:] if np.float32(w / each[0]) < bound
                ]
                total = sum(map(len, sorted_weights))
                assert row["choices skipped"] == pytest.approx(len(weak) / total)
                assert row["their weight"] == pytest.approx(
                    sum(w for w, _ in weak) / sum(map(sum, sorted_weights)), rel=1e-5
                )


@pytest.mark.parametrize(("batch", "draft"), [(1, 1), (3, 4), (999, 2)])
def test_coalescing(batch: int, draft: int) -> None:
    for traced in (*TRACES, ONE_TOKEN):
        options = coalescing.Options(batch, draft, expert_mb=2)
        documents = traced.tokens.document_T.tolist()
        at_once = min(batch, len(set(documents)))
        rank = np.random.default_rng(0).permutation(len(traced.tokens.domain_N))
        order = sorted(range(len(traced)), key=lambda at: (rank[documents[at]], at))
        length = len(order) // at_once
        steps = [[order[lane * length + step] for lane in range(at_once)] for step in range(length)]
        windows = [group for group in batched(documents, draft) if len(group) == draft]
        for layer, row in enumerate(layers_of(coalescing.run(traced, options))):
            picks, experts = chosen(traced, layer), experts_of(traced, layer)
            read = sum(len({e for at in step for e in picks[at]}) for step in steps) / len(steps)
            assert row["experts read"] == pytest.approx(read)
            assert row["share of the experts"] == pytest.approx(read / experts)
            assert row["MB a step"] == pytest.approx(2 * read)
            met = [len({e for at in window for e in picks[at]}) for window in windows]
            assert row[f"by {draft} consecutive tokens"] == (pytest.approx(sum(met) / len(met)) if met else None)
            use = [sum(e in step for step in picks) / len(traced) for e in range(experts)]
            assert row["same loads"] == pytest.approx(sum(1 - (1 - each) ** at_once for each in use))
            fair = experts * (1 - (1 - sum(use) / experts) ** at_once)
            assert row["by chance"] == pytest.approx(fair)
