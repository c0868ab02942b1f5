"""How often is an expert in a cache, when not all of them fit on the GPU? Hit rates, bytes and speed of every policy.

Legend: L layers, D domains, C experts that a cache holds of a layer, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.whatif.asked import computing_experts, require, require_numbers, require_share
from moectl.routing.whatif.eviction import BELADY, INFINITY, LFU, LRU, PROTECTED
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.hit_rates import chance, found, requested, static_chance, static_rate
from moectl.text import shown
from moectl.traces.trace import DECODE, PREFILL, RoutingTrace

STATIC = "static"
SCOPES = ("layer", "global")
PHASES = {"all": None, "prefill": PREFILL, "decode": DECODE}
POINTS = 64
"""Sizes that a curve is drawn through."""


@dataclass(frozen=True, slots=True)
class Options:
    """What experts are fetched from and to.

    Attributes:
        sizes: experts that are held of each layer, as `8,16,32`; if empty an eighth, a quarter, a half and three
            quarters of them, but never less than a token needs.
        scope: `layer` for a cache in each layer, `global` for one over all layers that holds as much in all. The latter
            takes ten times as long to find out.
        phase: which tokens: `all`, `prefill` or `decode`.
        fresh: whether every document finds the caches empty; else it finds what the one before left.
        target: a hit rate, of which the smallest size that reaches it is found.
        expert_mb: megabytes of an expert's weights.
        gb_per_s: at which they are fetched.
        dense_ms: milliseconds that a token takes when nothing is fetched.
        seed: of the random routing.
    """

    sizes: str = ""
    scope: str = "layer"
    phase: str = "all"
    fresh: bool = False
    target: float = 0.9
    expert_mb: float = 12.6
    gb_per_s: float = 25.0
    dense_ms: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("scope", self.scope, SCOPES), ("phase", self.phase, PHASES)):
            if value not in known:
                raise UsageError(f"There is no {name} {shown(value)!r}.", "", f"Give one of {', '.join(known)}.")
        require_numbers(self, "target")
        require_share(self, "target")


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Replay the requests for experts through caches of every size.

    Raises:
        InputError: the trace has no tokens of the phase.
        UsageError: a size is less than a token needs, or more than there are.
    """
    one, empty = options.scope == "global", options.fresh
    if options.phase != "all":
        trace = trace.where(trace.tokens.phase_T == PHASES[options.phase])
    require(trace, "cache")
    sizes = _sizes(trace, options.sizes)
    requests_LD = requested(trace)
    requests, per_token = max(int(requests_LD.sum()), 1), float(requests_LD.sum()) / len(trace)
    policies = [LRU, LFU, *([PROTECTED] if one else []), INFINITY, BELADY]
    hits_LDC = {policy: found(trace, policy, one=one, empty=empty) for policy in policies}
    rate_C = {policy: each.sum((0, 1)) / requests for policy, each in hits_LDC.items()}
    draw = partial(chance, trace, requests_L=requests_LD.sum(1), seed=options.seed)
    chance_C = {policy: draw(policy, one=one, empty=empty) for policy in policies}
    static_C = static_rate(trace, one=one)
    if static_C is not None:
        rate_C[STATIC] = static_C
        chance_C[STATIC] = static_chance(trace, requests_LD.sum(1))

    def ms(rate: float) -> float:
        return options.dense_ms + per_token * (1 - rate) * options.expert_mb / options.gb_per_s

    needed = {policy: _needed(rates, options.target) for policy, rates in rate_C.items()}
    rows: list[tuple[Cell, ...]] = []
    for policy, rates in rate_C.items():
        for size in sizes:
            rate, null = float(rates[size]), float(chance_C[policy][size])
            held = sum(min(size, computing_experts(routed)) for routed in trace.layers) * options.expert_mb / 1e3
            missed = per_token * (1 - rate)
            megabytes, speed = missed * options.expert_mb, 1e3 / ms(rate)
            rows.append((policy, size, held, rate, null, rate - null, missed, megabytes, speed, needed[policy]))
    domains = {name: at for at, name in enumerate(trace.tokens.domains) if requests_LD[:, at].any()}
    domain_C = {
        name: {policy: each[:, at].sum(0) / requests_LD[:, at].sum() for policy, each in hits_LDC.items()}
        for name, at in domains.items()
    }
    layer_C = {
        routed.point.label: {
            policy: each[at].sum(0) / max(requests_LD[at].sum(), 1) for policy, each in hits_LDC.items()
        }
        for at, routed in enumerate(trace.layers)
    }
    return Finding(
        "cache",
        _headline(rate_C, chance_C, needed[LRU], sizes[(len(sizes) - 1) // 2], options.target),
        (
            *("policy", "experts held", "GB", "hit rate", "random", "beyond it", "misses/token", "MB/token"),
            *("tokens/s", f"held for {options.target:.0%}"),
        ),
        tuple(rows),
        _curves(rate_C, chance_C, {name: each[LRU] for name, each in domain_C.items()}, ms, sizes[0], one),
        _assumptions(options, len(domains)),
        {
            "sizes": sizes,
            "requests_per_token": per_token,
            "experts_for_target": needed,
            "hit_rate": {policy: rates.tolist() for policy, rates in rate_C.items()},
            "random": {policy: rates.tolist() for policy, rates in chance_C.items()},
            "layers": _at(layer_C, sizes),
            "domains": _at(domain_C, sizes),
        },
    )


def _sizes(trace: RoutingTrace, given: str) -> list[int]:
    least = max(min(routed.point.top_k, computing_experts(routed)) for routed in trace.layers)
    most = max(map(computing_experts, trace.layers))
    if not given:
        return sorted({max(least, most * eighths // 8) for eighths in (1, 2, 4, 6)})
    try:
        sizes = sorted({int(size) for size in given.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < least or sizes[-1] > most:
        raise UsageError(
            f"Caches cannot hold {shown(given)!r} experts of a layer.",
            f"A token needs {least} of {most} at a time.",
            f"Give numbers from {least} to {most} with commas between them.",
        )
    return sizes


def _needed(rate_C: np.ndarray, target: float) -> int | None:
    """The smallest size that reaches a hit rate, if one does."""
    enough = np.flatnonzero(rate_C >= target)
    return int(enough[0]) if len(enough) else None


def _at(rates: Mapping[str, Mapping[str, np.ndarray]], sizes: list[int]) -> dict[str, dict[str, list[float]]]:
    return {name: {policy: each[sizes].tolist() for policy, each in own.items()} for name, own in rates.items()}


def _headline(
    rate_C: Mapping[str, np.ndarray], chance_C: Mapping[str, np.ndarray], needed: int | None, size: int, target: float
) -> str:
    lru, null, bound = rate_C[LRU][size], chance_C[LRU][size], rate_C[BELADY][size]
    enough = "with no size" if needed is None else f"with {needed}"
    return (
        f"With {size} of {len(rate_C[LRU]) - 1} experts of a layer held, LRU finds {lru:.1%} of the requests. Random "
        f"routing would find {null:.1%}, so {100 * (lru - null):+.1f} points are locality; with the future known "
        f"(Belady) it would be {bound:.1%}. LRU reaches {target:.0%} {enough}."
    )


def _curves(
    rate_C: Mapping[str, np.ndarray],
    chance_C: Mapping[str, np.ndarray],
    domain_C: Mapping[str, np.ndarray],
    ms: Callable[[float], float],
    least: int,
    one: bool,
) -> tuple[Curve, ...]:
    size_P = np.unique(np.linspace(least, len(rate_C[LRU]) - 1, POINTS).round().astype(int))
    x = [float(size) for size in size_P]
    label = "experts held of each layer, on average" if one else "experts held of each layer"
    null = {"random routing": chance_C[LRU][size_P].tolist()}
    lines = {policy: rates[size_P].tolist() for policy, rates in rate_C.items()} | null
    lines["random routing, Belady"] = chance_C[BELADY][size_P].tolist()
    speeds = {name: [1e3 / ms(rate) for rate in rates] for name, rates in lines.items()}
    curves = [
        Curve(
            "How often an expert is in the cache", label, "hit rate", x, lines, "random routing", BELADY, percent=True
        ),
        Curve("How fast decoding could be", label, "tokens/s", x, speeds, "random routing", BELADY),
    ]
    if len(domain_C) > 1:
        own = {name: rates[size_P].tolist() for name, rates in domain_C.items()} | null
        curves.append(Curve("LRU by domain", label, "hit rate", x, own, "random routing", percent=True))
    return tuple(curves)


def _assumptions(options: Options, domains: int) -> tuple[str, ...]:
    left = "finds the caches empty" if options.fresh else "finds in the caches what the one before it left"
    miss = f"{options.expert_mb:g} MB at {options.gb_per_s:g} GB/s for every miss"
    order = ("Caches go from domain to domain in the order of the trace.",) if domains > 1 and not options.fresh else ()
    return (
        "Every token is a step of its own, as when one sequence is decoded. A prefill reads an expert once for all.",
        "The experts of a step are asked for at once, and hits are counted before any comes in. Nothing is prefetched.",
        f"The first document finds the caches empty; every other {left}.",
        f"Tokens/s is a ceiling: {options.dense_ms:g} ms, and after it {miss}.",
        "Random routing finds C/E in a full cache, less while it fills, under all policies that know the past alone.",
        "Under Belady, and in a cache over all layers, random routing is simulated.",
        "static holds the busiest experts of one half of the documents and is judged on the other.",
        "It takes nothing in, so a small one may find more than a cache that fetches on demand, even Belady's.",
        "MoE-Infinity holds what the document asked for most (arXiv 2401.14361).",
        "MoE-Infinity's released engine goes by visits since loading instead.",
        "Belady bounds what is fetched on demand; routing that looks at the cache finds more (arXiv 2412.00099).",
        "Published: Mixtral-8x7B on an A5000 takes 0.735 s a token with MoE-Infinity, 1.752 s with mixtral-offloading.",
        "Least-Stale (arXiv 2602.03921) is left out: its rule was not at hand, and what others call so differs.",
        *order,
    )
