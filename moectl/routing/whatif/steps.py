"""Each piece of advice: what to do and its numbers, what they rest on, and the command that shows them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import exp
from typing import Any

import numpy as np

from moectl.routing.placement.packing import contiguous
from moectl.routing.placement.placement import fair_loads, gpu_loads, imbalance
from moectl.routing.whatif import all_to_all, cache, capacity, parallelism, placement
from moectl.routing.whatif.asked import computing, computing_experts
from moectl.routing.whatif.finding import Finding
from moectl.routing.whatif.machine import Machine, Model
from moectl.text import shown
from moectl.traces.information import entropy
from moectl.traces.trace import Routed, RoutingTrace

WORTH = 0.02
"""Of the mean load: what a change must take off the busiest GPU, at least, to be worth its trouble."""

MOST_FACTOR = 2.0
"""A capacity factor above which most places are padding, and none is advised."""

UNEVEN = 0.5
"""Of the experts that even routers would keep equally busy: with fewer than this the router is looked at first."""

TARGET = 0.9
"""Of the requests, how many are to find their expert in a cache."""

_MACHINE = ("gpus", "nodes", "gpus_per_node")
"""Options that a command line gives every what-if."""


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of advice: what to do and its numbers, what they rest on, and the command that shows them."""

    topic: str
    text: str
    assumption: str
    command: str


def _command(name: str, options: Any) -> str:
    """What shows a finding again: the machine, and other options where they are not the defaults."""
    default = type(options)()
    given = {each.name: getattr(options, each.name) for each in fields(options)}
    written = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in given.items()
        if key in _MACHINE or value != getattr(default, key)
    ]
    return f"moectl analyze-routing TRACE --what-if {':'.join([name, *[','.join(written)] * bool(written)])}"


def _rounded(number: float) -> str:
    """Three digits, and zeros behind large ones."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 1000 else f"{number:.3g}"


def memory(machine: Machine, model: Model, layers: int, most: int, expert_gb: float | None, slots: int | None) -> Step:
    each = -(-most // machine.gpus)
    free = f"{machine.gpu_memory_gb * (1 - machine.reserved):.3g} of {machine.gpu_memory_gb:g} GB"
    assumption = f"{machine.reserved:.0%} of the memory is kept for the KV cache and activations"
    if expert_gb is None or slots is None:
        room_mb = machine.gpu_memory_gb * (1 - machine.reserved) * 1e3 / (layers * each)
        text = (
            f"A GPU holds {each} of the experts of each of {layers} layers. They fit in {free} if an expert takes "
            f"{_rounded(room_mb)} MB or less, with nothing beside them."
        )
        return Step("memory", text, f"{assumption}; the size of the weights is not known.", "moectl inspect MODEL")
    if slots * machine.gpus >= most:
        room = f"all {most}" if slots >= most else slots
        text = f"The experts fit: {each} of a layer on each GPU, and there is room for {room}, in {free}."
    else:
        text = (
            f"The experts do not fit: each GPU would hold {each} of a layer, and has room for {slots}, in {free}. Use "
            f"{-(-most // slots)} GPUs of this kind, or fetch experts as they are needed."
            if slots
            else f"Not one expert of each layer fits beside the rest of the model, in {free}."
        )
    other = f"{model.other_gb or 0:.3g} GB of other weights stand on every GPU"
    return Step(
        "memory", text, f"{assumption}, and {other}; an expert takes {expert_gb * 1e3:.3g} MB.", "moectl inspect MODEL"
    )


def balance(trace: RoutingTrace, most: int) -> Step | None:
    """What to look at first where loads are far from even; None where they are not."""
    busy, fair, idle = [], [], []
    for routed in trace.layers:
        load_E = _loads(routed)
        top_k = min(routed.point.top_k, len(load_E))
        even_1E = fair_loads(round(int(load_E.sum()) / top_k), len(load_E), top_k, 1, np.random.default_rng(0))
        busy.append(exp(entropy(load_E)))
        fair.append(exp(entropy(even_1E[0].clip(0))))
        idle.append(int((load_E == 0).sum()))
    if np.mean(busy) >= UNEVEN * np.mean(fair):
        return None
    text = (
        f"Look at the router and at the text first: the load of a layer is as uneven as if {np.mean(busy):.3g} of "
        f"{most} experts had equal parts of all (even routers: {np.mean(fair):.3g}), and {np.mean(idle):.3g} of them "
        "get nothing."
    )
    return Step(
        "balance", text, "The text to come is as the trace's; else none of this holds.", "moectl analyze-routing TRACE"
    )


def _loads(routed: Routed) -> np.ndarray:
    """Assignments to each expert [E]."""
    index_TK, experts = computing(routed)
    return np.bincount(index_TK[index_TK >= 0], minlength=experts)


def unplaced(trace: RoutingTrace, gpus: int, *, equal: bool = False) -> float:
    """The largest load of a GPU over the mean where experts stand by their numbers, of the trace's loads or equal ones.

    The mean over layers.
    """
    loads = [np.ones(computing_experts(routed)) if equal else _loads(routed) for routed in trace.layers]
    return float(np.mean([imbalance(gpu_loads(contiguous(len(load_E), gpus), load_E)) for load_E in loads]))


def placed(trace: RoutingTrace, machine: Machine, spare: int) -> tuple[Step, Finding, dict[str, Any]]:
    tried = placement.run(trace, placement.Options(gpus=machine.gpus, replicas=0, nodes=machine.nodes))
    before, packed = tried.detail["imbalance"]["contiguous"], tried.detail["imbalance"]["repacked"]
    by_replicas = tried.curves[1]
    copied = {
        int(count): value
        for count, value in zip(by_replicas.x, by_replicas.lines["replicated"], strict=True)
        if count <= spare and value is not None
    }
    chance = tried.detail["imbalance"]["chance"]
    # A difference that chance makes is none: what it adds to what equal loads would come to.
    worth = max(WORTH, chance - unplaced(trace, machine.gpus, equal=True))
    best = min([packed, *copied.values()])
    replicas = min((count for count, value in copied.items() if value <= best + worth), default=0)
    if before - best < worth:
        how, replicas, after = "contiguous", 0, before
    elif packed - best < worth:
        how, replicas, after = "repacked", 0, packed
    else:
        how, after = "replicated", copied[replicas]
    options = placement.Options(gpus=machine.gpus, replicas=replicas, nodes=machine.nodes)
    found = placement.run(trace, options)
    if how == "replicated":  # slots that are left where GPUs do not divide experts are filled too
        most = max(len(fitted) for fitted in found.detail["slots"])
        replicas = most - max(len(load) for load in found.detail["loads"])
    if how == "contiguous":
        text = (
            f"Leave the experts where their numbers put them: the busiest of {machine.gpus} GPUs has {before:.2f} "
            f"times the mean load, chance gives {chance:.2f}, and no placement that was tried takes off {worth:.2g}."
        )
    else:
        copies = f", with {replicas} replicas in each layer" if replicas else ""
        text = (
            f"Place the experts by load{copies}: the busiest of {machine.gpus} GPUs has {after:.2f} times the mean "
            f"load in place of {before:.2f}, which takes {1 - after / before:.0%} off the time of the experts; chance "
            f"gives {chance:.2f}."
        )
    apart = _worst(found.detail["transfer"])
    assumption = f"Fitted on one half of the documents and judged on the other; {apart}."
    return (
        Step("placement", text, assumption, _command("placement", options)),
        found,
        {
            "placement": how,
            "replicas": replicas,
            "imbalance": {"before": before, "after": after, "chance": chance},
        },
    )


def _worst(transfer: Mapping[str, Mapping[str, float]]) -> str:
    """What happens on text that the placement was not fitted on."""
    apart = [
        (value, fit, judge)
        for fit, row in transfer.items()
        for judge, value in row.items()
        if fit not in ("all", judge)
    ]
    if not apart:
        return "the text to come is like that of the trace"
    value, fit, judge = max(apart)
    alone = f"fitted on {shown(fit)} alone, {shown(judge)} has {value:.2f}"
    return f"the text to come is mixed like that of the trace ({alone})"


def cached(
    trace: RoutingTrace, machine: Machine, most: int, held: int, expert_gb: float
) -> tuple[Step, Finding, dict[str, Any]]:
    options = cache.Options(expert_mb=expert_gb * 1e3, gb_per_s=machine.host_gb_per_s * machine.gpus, target=TARGET)
    found = cache.run(trace, options)
    rate, null = (float(found.detail[name]["LRU"][held]) for name in ("hit_rate", "random"))
    megabytes = found.detail["requests_per_token"] * (1 - rate) * expert_gb * 1e3
    ceiling = machine.host_gb_per_s * machine.gpus * 1e3 / megabytes if megabytes else None
    needed = found.detail["experts_for_target"]["LRU"]
    enough = f"{TARGET:.0%} take {needed}" if needed is not None else f"no size reaches {TARGET:.0%}"
    text = (
        f"Keep {held} of {most} experts of a layer in a cache on the GPUs (LRU): {rate:.1%} of the requests find "
        f"theirs, {null:.1%} by chance, and a token fetches {megabytes:.3g} MB, "
        f"{'at most ' + _rounded(ceiling) + ' tokens/s' if ceiling else 'nothing'}. {enough}."
    )
    assumption = (
        f"Tokens are decoded one at a time; every GPU fetches {machine.host_gb_per_s:g} GB/s from its host, and "
        "nothing is prefetched."
    )
    choice = {"experts_of_a_layer": held, "hit_rate": rate, "chance": null, "tokens_per_s_at_most": ceiling}
    return Step("cache", text, assumption, _command("cache", options)), found, choice


def with_capacity(trace: RoutingTrace, machine: Machine) -> tuple[Step, Finding, float]:
    options = capacity.Options(gpus=machine.gpus)
    found = capacity.run(trace, options)
    by_name = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    factor = max(float(row["factor for under 1%"] or 0) for row in by_name.values())
    mean = by_name["mean"]
    dropped, by_chance = (float(mean[name] or 0) for name in ("dropped", "by chance"))
    or_factor = (
        f", or a factor of {factor:.3g}, which drops less than 1% in every layer"
        if factor <= MOST_FACTOR
        else f": a factor would have to be {factor:.3g} to drop less than 1% in every layer"
    )
    text = (
        f"Use an engine without a capacity{or_factor}; at {options.factor:g} it is {dropped:.1%} ({by_chance:.1%} by "
        "chance)."
    )
    return Step("capacity", text, found.assumptions[1], _command("capacity", options)), found, factor


def traffic(trace: RoutingTrace, machine: Machine, model: Model, uneven: float) -> tuple[Step, Finding, float | None]:
    options = all_to_all.Options(
        gpus=machine.gpus,
        gpus_per_node=machine.gpus // machine.nodes,
        hidden_size=model.hidden_size or all_to_all.Options().hidden_size,
    )
    found = all_to_all.run(trace, options)
    where = "nodes" if machine.nodes > 1 else "GPUs"
    mean = dict(zip(found.columns, found.rows[-1], strict=True))
    there_and_back = 2 * len(trace.layers) * float(mean[f"kB to other {where}"] or 0)
    ceiling = machine.link_gb_per_s * 1e6 / there_and_back / uneven if there_and_back else None
    carries = "no link is needed"
    if ceiling:
        carries = (
            f"{machine.link_gb_per_s:g} GB/s carry {_rounded(ceiling)} tokens a second of every GPU at most, for the "
            f"busiest takes {uneven:.2f} times the mean"
        )
    met = mean["nodes" if machine.nodes > 1 else "GPUs"]
    by_chance = mean["nodes by chance" if machine.nodes > 1 else "GPUs by chance"]
    text = (
        f"A token goes to {met:.2f} {where} in each layer ({by_chance:.2f} by chance): {there_and_back / 1e3:.3g} MB "
        f"there and back in all layers, so {carries}."
    )
    width = "" if model.hidden_size else f", {options.hidden_size} of them, for the width is not known"
    assumption = f"Sent once to each of the {where}, in values of 2 bytes{width}; experts stand by their numbers."
    return Step("traffic", text, assumption, _command("all-to-all", options)), found, ceiling


def mix(
    trace: RoutingTrace, machine: Machine, hidden_size: int, expert_gb: float, free_gb: float
) -> tuple[Step, Finding, str | None]:
    width = max(1, round(expert_gb * 1e9 / (3 * hidden_size * 2)))
    options = parallelism.Options(
        gpus=machine.gpus,
        hidden_size=hidden_size,
        intermediate_size=width,
        gb_per_s=machine.link_gb_per_s,
        memory_gb=free_gb,
        sharded=False,
        training=False,
    )
    found = parallelism.run(trace, options)
    by_size = f"Width by the size of an expert, at {options.value_bytes:g} bytes a weight."
    rests = " ".join((by_size, *found.assumptions[:2]))
    return (
        Step("parallelism", found.headline, rests, _command("parallelism", options)),
        found,
        found.detail["chosen"],
    )
