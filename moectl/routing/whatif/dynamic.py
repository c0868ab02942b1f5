"""What do shadowing, migration and prediction gain over a placement that stays, and what over perfect knowledge?

The trace is read as batches of tokens in their order. What stays, and what predicts, is fitted on the first half of the
batches; all policies are judged on the second. Legend: B judged batches, L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from moectl.report.output import Cell
from moectl.routing.placement.loads import batch_loads, require_tokens
from moectl.routing.placement.packing import contiguous
from moectl.routing.placement.placement import fair_loads, gpu_loads, imbalance
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.policies import POLICIES, Outcome, judged
from moectl.routing.whatif.policies import Options as Options
from moectl.traces.trace import RoutingTrace

LEAST_TOKENS = 8
MOST_POINTS = 128
DRAWS = 256


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Imbalance, experts moved and modelled time of every policy.

    Raises:
        InputError: the trace has fewer than eight tokens.
    """
    require_tokens(trace, "dynamic", LEAST_TOKENS)
    size = min(options.batch_tokens, len(trace) // LEAST_TOKENS)
    found: dict[str, list[list[Outcome]]] = {policy: [] for policy in POLICIES}
    even_s, chance = 0.0, []
    generator = np.random.default_rng(options.seed)
    for number, routed in enumerate(trace.layers):
        load_BE = batch_loads(routed, size)
        late_BE = load_BE[len(load_BE) // 2 :]
        even_s += float(late_BE.sum()) / options.gpus * options.cost.token_s
        for policy, outcomes in judged(trace, number, load_BE, size, options).items():
            found[policy].append(outcomes)
        experts, top_k = late_BE.shape[1], min(routed.point.top_k, late_BE.shape[1])
        fair_XE = fair_loads(round(late_BE.sum(1).mean() / top_k), experts, top_k, DRAWS, generator)
        chance.append(float(imbalance(gpu_loads(contiguous(experts, options.gpus), fair_XE)).mean()))
    return _finding(found, float(np.mean(chance)), even_s, size, options)


def _finding(
    found: dict[str, list[list[Outcome]]], chance: float, even_s: float, size: int, options: Options
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
    return (
        "What stays, and what predicts, is fitted on the first half of the batches, in the order of the trace.",
        (
            f"Time is FasterMoE's model: {options.said()}; {options.tflops:g} TFLOP/s and {options.gb_per_s:g} GB/s "
            "for each GPU, nothing overlapped."
        ),
        (
            "Experts that a GPU lacks are received one after another, by all GPUs at once; Lina's are received while "
            "the layer before computes, and only the rest is waited for."
        ),
        "Shadowed experts compute tokens where they are, and tokens are evenly spread over the GPUs.",
        (
            "Lina keeps what each way of first choices leads to most, which of even loads is little more than noise, "
            "scales it to all GPUs, and packs experts, not slots: a GPU may have many that are seldom used. Layers "
            "with too few before them stay as they stand."
        ),
        "Only weights are moved: what an optimiser keeps of an expert, which FlexMoE moves as well, is not counted.",
        "Perfect knowledge is still packed greedily: a little less may be possible.",
        (
            "FlexMoE reports 1.70x over DeepSpeed (arXiv 2304.03946), Lina 1.63x at the 95th percentile of inference "
            "(arXiv 2210.17223), FasterMoE 1.37x to 17.87x (PPoPP 2022)."
        ),
    )
