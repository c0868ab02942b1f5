"""What do shadowing, migration and prediction gain over a placement that stays, and what over perfect knowledge?

The trace is read as batches of tokens in their order. What stays, and what predicts, is fitted on the first half of the
batches; all policies are judged on the second. Legend: B judged batches, L layers, T tokens, K choices, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.placement.adapting import (
    Cost,
    cost_model,
    flexed,
    foreseen,
    popularity,
    received,
    shadowed,
    ways,
)
from moectl.routing.placement.loads import batch_loads, require_tokens
from moectl.routing.placement.packing import contiguous, eplb
from moectl.routing.placement.placement import Placement, fair_loads, gpu_loads, imbalance
from moectl.routing.whatif.asked import computing_experts, require_numbers
from moectl.routing.whatif.finding import Curve, Finding
from moectl.traces.trace import RoutingTrace

LEAST_TOKENS = 8
MOST_POINTS = 128
DRAWS = 256
POLICIES = {
    "contiguous": "as the experts' numbers stand",
    "once": "EPLB, fitted on the first half",
    "each batch": "EPLB, fitted on the batch before",
    "flexmoe": "copies move between batches, when it pays (from memory)",
    "fastermoe": "the busiest experts go to all GPUs for the batch",
    "lina": "EPLB, fitted on what the layer before foretells (from memory)",
    "lina corrected": "the same, and again when the busiest experts were others",
    "perfect": "EPLB, fitted on the batch itself, at no cost",
}


@dataclass(frozen=True, slots=True)
class Options:
    """The machine, the model and the policies.

    Attributes:
        gpus: over which the experts of each layer are spread.
        replicas: slots of a layer beyond one for each expert; more, where it takes more to fill all GPUs equally.
        batch_tokens: tokens of a batch, over all GPUs; fewer, where the trace has fewer than eight batches.
        threshold: FlexMoE moves copies while the largest load of a GPU is above so many means.
        patience: batches in which a move of FlexMoE is to pay for itself.
        path: how many layers Lina looks back, 1 or 2.
        hidden_size, intermediate_size: of the model and of an expert.
        value_bytes: of a weight, and of a feature that is sent.
        tflops: what a GPU computes of experts in a second, in 10^12 operations.
        gb_per_s: what a GPU sends or receives in a second.
        training: three passes of computing and four exchanges of tokens, in place of one and two.
        seed: of what chance draws.
    """

    gpus: int = 8
    replicas: int = 8
    batch_tokens: int = 4096
    threshold: float = 1.1
    patience: float = 10.0
    path: int = 1
    hidden_size: int = 2048
    intermediate_size: int = 1024
    value_bytes: float = 2.0
    tflops: float = 200.0
    gb_per_s: float = 50.0
    training: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "replicas", "threshold", "patience")
        if self.path > 2:
            raise UsageError(f"path cannot be {self.path}.", "", "Give path=1, or 2.")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one batch came to under one policy.

    Attributes:
        imbalance: the largest load of a GPU over the mean.
        moved: the most experts that a GPU received.
        seconds: modelled time, with waiting for experts.
        foreseen: of the busiest experts, how many the layer before foretold; None in a layer with none before it.
    """

    imbalance: float
    moved: int
    seconds: float
    foreseen: float | None = None


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Imbalance, experts moved and modelled time of every policy.

    Raises:
        InputError: the trace has fewer than eight tokens.
    """
    require_tokens(trace, "dynamic", LEAST_TOKENS)
    size = min(options.batch_tokens, len(trace) // LEAST_TOKENS)
    cost = cost_model(
        options.hidden_size,
        options.intermediate_size,
        options.value_bytes,
        options.tflops,
        options.gb_per_s,
        options.training,
    )
    found: dict[str, list[list[_Outcome]]] = {policy: [] for policy in POLICIES}
    even_s, chance = 0.0, []
    generator = np.random.default_rng(options.seed)
    for number, routed in enumerate(trace.layers):
        load_BE = batch_loads(routed, size)
        judged = load_BE[len(load_BE) // 2 :]
        even_s += float(judged.sum()) / options.gpus * cost.token_s
        for policy, outcomes in _judge(trace, number, load_BE, size, cost, options).items():
            found[policy].append(outcomes)
        experts, top_k = judged.shape[1], min(routed.point.top_k, judged.shape[1])
        fair_XE = fair_loads(int(judged[0].sum()) // top_k, experts, top_k, DRAWS, generator)
        chance.append(float(imbalance(gpu_loads(contiguous(experts, options.gpus), fair_XE)).mean()))
    return _finding(found, float(np.mean(chance)), even_s, size, options)


def _judge(
    trace: RoutingTrace, number: int, load_BE: np.ndarray, size: int, cost: Cost, options: Options
) -> dict[str, list[_Outcome]]:
    """One layer: what every judged batch came to under every policy."""
    half, experts, gpus = len(load_BE) // 2, load_BE.shape[1], options.gpus
    slots = -(-(experts + options.replicas) // gpus) * gpus
    busiest = min(2 * trace.layers[number].point.top_k, experts)
    stays, once = contiguous(experts, gpus), eplb(load_BE[:half].sum(0), slots, gpus)
    flexible = eplb(np.ones(experts), slots, gpus)
    for load_E in load_BE[: half - 1]:
        flexible = flexed(flexible, load_E, cost, options.threshold, options.patience)
    placed = {"contiguous": stays, "once": once, "each batch": eplb(load_BE[half - 2], slots, gpus)}
    placed |= {
        "flexmoe": flexible,
        "lina": once,
        "lina corrected": once,
        "perfect": eplb(load_BE[half - 1], slots, gpus),
    }
    found: dict[str, list[_Outcome]] = {policy: [] for policy in POLICIES}
    forecasts = _forecasts(trace, number, size, half, len(load_BE), options)
    for seen_E, load_E in pairwise(load_BE[half - 1 :]):
        forecast_E = next(forecasts, None)
        known = None if forecast_E is None else _same(forecast_E, load_E, busiest)
        right = known in (None, 1)
        perfect = eplb(load_E, slots, gpus)
        foretold = once if forecast_E is None else eplb(forecast_E, slots, gpus)
        planned = {
            "contiguous": stays,
            "once": once,
            "each batch": eplb(seen_E, slots, gpus),
            "flexmoe": flexed(placed["flexmoe"], seen_E, cost, options.threshold, options.patience),
            "lina": foretold,
            "lina corrected": foretold if right else perfect,
            "perfect": perfect,
        }
        layer_s = float(load_E.sum()) / gpus * cost.token_s
        unseen_s = {"lina": layer_s, "lina corrected": layer_s if right else 0.0, "perfect": math.inf}
        for policy, placement in planned.items():
            load_G = gpu_loads(placement, load_E)
            moved = received(placed[policy], placement)
            waiting_s = max(0.0, moved * cost.expert_s - unseen_s.get(policy, 0.0))
            seconds = float(load_G.max()) * cost.token_s + waiting_s
            found[policy].append(_Outcome(float(imbalance(load_G)), moved, seconds, known))
        found["fastermoe"].append(_shadow(load_E, stays, cost))
        placed = planned
    return found


def _shadow(load_E: np.ndarray, placement: Placement, cost: Cost) -> _Outcome:
    """Experts that are copied to all GPUs compute each token where it is: evenly, and without an exchange."""
    copied_E = shadowed(load_E, cost)
    sent_G = gpu_loads(placement, np.where(copied_E, 0, load_E))
    load_G = sent_G + load_E[copied_E].sum() / placement.gpus
    copied = int(copied_E.sum())
    seconds = load_G.max() * cost.compute_s + sent_G.max() * cost.exchange_s + copied * cost.expert_s
    return _Outcome(float(imbalance(load_G)), copied, float(seconds))


def _forecasts(
    trace: RoutingTrace, number: int, size: int, half: int, batches: int, options: Options
) -> Iterator[np.ndarray]:
    """The loads that the layers before foretell for every judged batch; nothing for a layer with too few before it."""
    back = trace.layers[max(0, number - options.path) : number]
    if len(back) == 0:
        return
    experts = max(routed.point.num_experts for routed in back)
    routed = trace.layers[number]
    fitted = slice(0, half * size)
    way_T = ways(np.stack([each.index_TK[: batches * size, 0] for each in back]), experts)
    num_ways, own = (experts + 1) ** len(back), computing_experts(routed)
    popular_WE = popularity(way_T[fitted], routed.index_TK[fitted], num_ways, own)
    for batch in range(half, batches):
        yield foreseen(way_T[batch * size : (batch + 1) * size], popular_WE)


def _same(forecast_E: np.ndarray, load_E: np.ndarray, busiest: int) -> float:
    """Of the experts that are busiest, how many were foreseen among the busiest."""
    guessed = set(np.argsort(-forecast_E, kind="stable")[:busiest].tolist())
    return len(guessed & set(np.argsort(-load_E, kind="stable")[:busiest].tolist())) / busiest


def _finding(
    found: dict[str, list[list[_Outcome]]], chance: float, even_s: float, size: int, options: Options
) -> Finding:
    rows: list[tuple[Cell, ...]] = []
    means, over_even, lines = {}, {}, {}
    for policy, outcomes_LB in found.items():
        even_LB = np.array([[each.imbalance for each in outcomes] for outcomes in outcomes_LB])
        moved = float(np.mean([each.moved for outcomes in outcomes_LB for each in outcomes]))
        seconds = sum(each.seconds for outcomes in outcomes_LB for each in outcomes)
        means[policy], over_even[policy] = float(even_LB.mean()), seconds / even_s if even_s else 1.0
        lines[policy] = even_LB.mean(0)
        rows.append((policy, means[policy], float(even_LB.max()), moved, over_even[policy], POLICIES[policy]))
    rows.append(("chance", chance, None, None, None, "even routers, contiguous"))
    foretold = [each.foreseen for row in found["lina"] for each in row if each.foreseen is not None]
    shown = np.unique(np.linspace(0, len(lines["once"]) - 1, MOST_POINTS).astype(int))
    drawn: dict[str, list[float | None]] = {
        policy: [float(each) for each in line[shown]] for policy, line in lines.items()
    }
    drawn["chance"] = [chance] * len(shown)
    best = min((policy for policy in POLICIES if policy != "perfect"), key=lambda policy: over_even[policy])
    headline = (
        f"Over batches of {size} tokens on {options.gpus} GPUs the busiest has {means['contiguous']:.2f} times the "
        f"mean load, {means['once']:.2f} with EPLB once, {means['flexmoe']:.2f} with FlexMoE, {means['fastermoe']:.2f} "
        f"with shadowing, {means['lina']:.2f} with Lina, {means['perfect']:.2f} with perfect knowledge; by chance "
        f"{chance:.2f}. With the moves, {best} is fastest: {over_even[best]:.2f} times perfectly even loads."
    )
    return Finding(
        "dynamic",
        headline,
        (
            "policy",
            "largest load over the mean",
            "worst batch",
            "experts moved a batch",
            "time over even",
            "what it is",
        ),
        tuple(rows),
        (
            Curve(
                f"Load of the busiest of {options.gpus} GPUs, batch by batch",
                f"batch of {size} tokens",
                "largest load over the mean",
                [int(batch) for batch in shown],
                drawn,
                chance="chance",
                bound="perfect",
            ),
        ),
        _assumptions(options),
        {
            "batch_tokens": size,
            "imbalance": means | {"chance": chance},
            "time_over_even": over_even,
            "fastest": best,
            "lina_busiest_foreseen": float(np.mean(foretold)) if foretold else None,
        },
    )


def _assumptions(options: Options) -> tuple[str, ...]:
    passes = "three passes and four exchanges of tokens (training)" if options.training else "one pass, two exchanges"
    fitted = "What stays, and what predicts, is fitted on the first half of the batches, in the order of the trace."
    model = (
        f"Time is FasterMoE's model: {passes}; experts of 3 x {options.hidden_size} x {options.intermediate_size} "
        f"weights, {options.tflops:g} TFLOP/s and {options.gb_per_s:g} GB/s for each GPU, nothing overlapped."
    )
    moves = (
        "Experts that a GPU lacks are received one after another, by all GPUs at once; Lina's are received while the "
        "layer before computes, and only the rest is waited for."
    )
    papers = (
        "FlexMoE and Lina are written from memory of their papers. They report 1.70x over DeepSpeed (2304.03946) and "
        "1.63x at the 95th percentile of inference (ATC 2023); FasterMoE reports 1.37x to 17.87x (PPoPP 2022)."
    )
    return (
        fitted,
        model,
        moves,
        "Shadowed experts compute tokens where they are, and tokens are evenly spread over the GPUs.",
        "Perfect knowledge is still packed greedily: a little less may be possible.",
        papers,
    )
