"""What every policy of placing experts comes to, batch by batch, at one layer.

Legend: B batches, T tokens, E experts, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moectl.errors import UsageError
from moectl.routing.placement.adapting import flexed, received, shadowed
from moectl.routing.placement.foretelling import foreseen, popularity, proportional, ways
from moectl.routing.placement.hardware import Cost, Hardware
from moectl.routing.placement.packing import contiguous, eplb
from moectl.routing.placement.placement import Placement, gpu_loads, imbalance
from moectl.routing.whatif.asked import computing_experts, require_numbers
from moectl.traces.trace import RoutingTrace

POLICIES = {
    "contiguous": "as the experts' numbers stand",
    "once": "EPLB, fitted on the first half",
    "each batch": "EPLB, fitted on the batch before",
    "flexmoe": "copies move between batches, when it pays",
    "fastermoe": "the busiest experts go to all GPUs for the batch",
    "lina": "GPUs in proportion to what the layers before foretell",
    "lina corrected": "the same, and to the loads themselves where the busiest experts were others",
    "perfect": "EPLB, fitted on the batch itself, at no cost",
}


@dataclass(frozen=True, slots=True)
class Options(Hardware):
    """The machine, the model and the policies.

    Attributes:
        replicas: slots of a layer beyond one for each expert; more, where it takes more to fill all GPUs equally.
        batch_tokens: tokens of a batch, over all GPUs; fewer, where the trace has fewer than eight batches.
        threshold: FlexMoE moves copies while the largest load of a GPU is above so many means.
        patience: batches in which a move of FlexMoE is to pay for itself.
        path: how many layers Lina looks back, 1 to 3.
        seed: of what chance draws.
    """

    replicas: int = 8
    batch_tokens: int = 4096
    threshold: float = 1.1
    patience: float = 10.0
    path: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "replicas", "threshold", "patience")
        if self.path > 3:
            raise UsageError(f"path cannot be {self.path}.", "", "Give path=1, 2 or 3.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one batch came to under one policy.

    Attributes:
        imbalance: the largest load of a GPU over the mean.
        moved: the most experts that a GPU received.
        seconds: modelled time, with waiting for experts.
        foreseen: of the busiest experts, how many the layers before foretold; None in a layer with none before it.
    """

    imbalance: float
    moved: int
    seconds: float
    foreseen: float | None = None


def judged(
    trace: RoutingTrace, number: int, load_BE: np.ndarray, size: int, options: Options
) -> dict[str, list[Outcome]]:
    """One layer: what every batch of the second half came to under every policy.

    Args:
        number: of the layer in the trace.
        load_BE: its loads in all batches, of `size` tokens.
    """
    half, experts, gpus, cost = len(load_BE) // 2, load_BE.shape[1], options.gpus, options.cost
    slots = -(-(experts + options.replicas) // gpus) * gpus
    busiest = min(2 * trace.layers[number].point.top_k, experts)
    stays, once = contiguous(experts, gpus), eplb(load_BE[:half].sum(0), slots, gpus)
    flexible = eplb(np.ones(experts), slots, gpus)
    for load_E in load_BE[: half - 1]:
        flexible = flexed(flexible, load_E, cost, options.threshold, options.patience)
    placed = {"contiguous": stays, "once": once, "each batch": eplb(load_BE[half - 2], slots, gpus)}
    placed |= {
        "flexmoe": flexible,
        "lina": stays,
        "lina corrected": stays,
        "perfect": eplb(load_BE[half - 1], slots, gpus),
    }
    found: dict[str, list[Outcome]] = {policy: [] for policy in POLICIES}
    forecasts = _forecasts(trace, number, size, half, len(load_BE), options)
    for seen_E, load_E in pairwise(load_BE[half - 1 :]):
        forecast_E = next(forecasts, None)
        known = None if forecast_E is None else _same(forecast_E, load_E, busiest)
        right = known in (None, 1)
        foretold = stays if forecast_E is None else proportional(forecast_E, gpus)
        planned = {
            "contiguous": stays,
            "once": once,
            "each batch": eplb(seen_E, slots, gpus),
            "flexmoe": flexed(placed["flexmoe"], seen_E, cost, options.threshold, options.patience),
            "lina": foretold,
            "lina corrected": foretold if right else proportional(load_E, gpus),
            "perfect": eplb(load_E, slots, gpus),
        }
        layer_s = float(load_E.sum()) / gpus * cost.token_s
        unseen_s = {"lina": layer_s, "lina corrected": layer_s if right else 0.0, "perfect": math.inf}
        for policy, placement in planned.items():
            load_G = gpu_loads(placement, load_E)
            moved = received(placed[policy], placement)
            waiting_s = max(0.0, moved * cost.expert_s - unseen_s.get(policy, 0.0))
            seconds = float(load_G.max()) * cost.token_s + waiting_s
            found[policy].append(Outcome(float(imbalance(load_G)), moved, seconds, known))
        found["fastermoe"].append(_shadow(load_E, stays, cost))
        placed = planned
    return found


def _shadow(load_E: np.ndarray, placement: Placement, cost: Cost) -> Outcome:
    """Experts that are copied to all GPUs compute each token where it is: evenly, and without an exchange."""
    copied_E = shadowed(load_E, cost)
    sent_G = gpu_loads(placement, np.where(copied_E, 0, load_E))
    load_G = sent_G + load_E[copied_E].sum() / placement.gpus
    copied = int(copied_E.sum())
    seconds = load_G.max() * cost.compute_s + sent_G.max() * cost.exchange_s + copied * cost.expert_s
    return Outcome(float(imbalance(load_G)), copied, float(seconds))


def _forecasts(
    trace: RoutingTrace, number: int, size: int, half: int, batches: int, options: Options
) -> Iterator[np.ndarray]:
    """What the layers before foretell for every batch of the second half; nothing where there are too few of them."""
    if number < options.path:
        return
    back, routed = trace.layers[number - options.path : number], trace.layers[number]
    way_T = ways(
        np.stack([each.index_TK[: batches * size, 0] for each in back]), max(each.point.num_experts for each in back)
    )
    fitted, experts = slice(0, half * size), computing_experts(routed)
    popular = popularity(way_T[fitted], routed.index_TK[fitted], experts, routed.point.top_k)
    for batch in range(half, batches):
        yield foreseen(way_T[batch * size : (batch + 1) * size], popular, experts)


def _same(forecast_E: np.ndarray, load_E: np.ndarray, busiest: int) -> float:
    """Of the experts that are busiest, how many were foreseen among the busiest."""
    guessed = set(np.argsort(-forecast_E, kind="stable")[:busiest].tolist())
    return len(guessed & set(np.argsort(-load_E, kind="stable")[:busiest].tolist())) / busiest
