"""How even is the load of GPUs, as experts stand by their numbers, repacked by load, and with copies of the busiest?

Placements are fitted on one half of the documents and judged on the other. Legend: D domains, E experts, H halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.placement import export
from moectl.routing.placement.loads import halves, part_loads, require_tokens
from moectl.routing.placement.packing import contiguous, eplb, repacked
from moectl.routing.placement.placement import Placement, fair_loads, gpu_loads, imbalance, least_imbalance
from moectl.routing.whatif.asked import require_numbers, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.text import shown
from moectl.traces.trace import Point, RoutingTrace

DRAWS = 256
MOST_GPUS = 256
PUBLISHED = (
    "Published counts of OLMoE-1B-7B (allenai/OLMoE), layers 0, 7 and 15, fitted and judged on the same: github on 8 "
    "GPUs 1.27, 2.14, 1.28 contiguous and 1.06, 1.01, 1.00 repacked; arxiv on 16 GPUs 2.63, 1.92, 2.27, "
    "repacked 2.13, 1.61, 1.88, and 1.035, 1.033, 1.035 with 16 replicas."
)
MOST_COPIES = 3
"""Of each expert, on average, up to which replicas are tried for the curve."""

POLICIES = ("contiguous", "repacked", "replicated")


@dataclass(frozen=True, slots=True)
class Options:
    """What experts are placed on.

    Attributes:
        gpus: over which the experts of each layer are spread.
        replicas: slots of a layer beyond one for each expert; more, where it takes more to fill all GPUs equally.
        nodes: on which the GPUs are, equally many on each.
        groups: of experts that are to stay on one node, as groups of a group-limited router.
        domain: whose text the placement is fitted on, to be judged on the other domains; all, if empty.
        seed: of what chance draws.
    """

    gpus: int = 8
    replicas: int = 8
    nodes: int = 1
    groups: int = 1
    domain: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "replicas")


@dataclass(frozen=True, slots=True)
class _Layer:
    point: Point
    load_HDE: np.ndarray
    fit_E: np.ndarray
    judge_E: np.ndarray


def run(trace: RoutingTrace, options: Options) -> Finding:
    """The largest load of a GPU over the mean, for each layer and placement.

    Raises:
        UsageError: there is no such domain.
        InputError: the trace has no tokens.
    """
    require_tokens(trace, "placement")
    layers = _layers(trace, options)
    generator = np.random.default_rng(options.seed)
    rows: list[tuple[Cell, ...]] = []
    placed: list[dict[str, Placement]] = []
    for layer in layers:
        placed.append(_placements(layer.fit_E, options.gpus, options.replicas, options))
        even = [_judged(placed[-1][policy], layer.judge_E) for policy in POLICIES]
        least = float(least_imbalance(layer.judge_E, options.gpus))
        rows.append((layer.point.label, *even, _chance(layer, options.gpus, generator), least))
    table = with_mean(rows)
    means = [float(mean) for mean in table[-1][1:] if mean is not None]
    transfer = _transfer(layers, trace.tokens.domains, options)
    apart = [
        (f"fitted on {shown(fit, 40)}, judged on {shown(judge, 40)}", None, None, value, None, None)
        for fit, row in transfer.items()
        for judge, value in row.items()
        if fit not in ("all", judge)
    ]
    slots = sorted({len(each["replicated"].expert_S) for each in placed})
    return Finding(
        "placement",
        _headline(means, options, slots, transfer),
        ("layer", *POLICIES, "chance", "least without replicas"),
        (*table, *apart),
        (_over_gpus(layers, options, generator), _over_replicas(layers, options, means)),
        _assumptions(options),
        {
            "gpus": options.gpus,
            "layers": [layer.point.layer for layer in layers],
            "expert_gpu": [_gpu_of(each["repacked"]) for each in placed],
            "slots": [each["replicated"].expert_S.tolist() for each in placed],
            "slot_gpu": [each["replicated"].gpu_S.tolist() for each in placed],
            "imbalance": dict(zip((*POLICIES, "chance", "least"), means, strict=True)),
            "transfer": transfer,
            "loads": [(layer.fit_E + layer.judge_E).tolist() for layer in layers],
        },
    )


def write_placement(path: Path, finding: Finding, engine: str = "sglang", *, overwrite: bool = False) -> str:
    """Write the replicated placement of a finding of `run` for an engine; says how the engine is told of it.

    Raises:
        UsageError: there is no such engine, or the file is there or misnamed.
        InputError: the placement is of a shape that engines do not take.
    """
    detail = finding.detail
    return export.export(detail["slots"], detail["gpus"], detail["layers"], path, engine, overwrite=overwrite)


def _layers(trace: RoutingTrace, options: Options) -> list[_Layer]:
    domains = trace.tokens.domains
    if options.domain and options.domain not in domains:
        raise UsageError(
            f"The trace has no domain {shown(options.domain)!r}.", "", f"Give one of {', '.join(map(shown, domains))}."
        )
    fitted = [name == options.domain for name in domains] if options.domain else [True] * len(domains)
    others = [not each for each in fitted] if options.domain and len(domains) > 1 else fitted
    part_T = halves(trace.tokens) * len(domains) + trace.tokens.domain_T
    found = []
    for routed in trace.layers:
        load_HDE = part_loads(routed, part_T, 2 * len(domains)).reshape(2, len(domains), -1)
        found.append(_Layer(routed.point, load_HDE, load_HDE[0][fitted].sum(0), load_HDE[1][others].sum(0)))
    return found


def _placements(fit_E: np.ndarray, gpus: int, replicas: int, options: Options) -> dict[str, Placement]:
    slots = -(-(len(fit_E) + replicas) // gpus) * gpus
    return {
        "contiguous": contiguous(len(fit_E), gpus),
        "repacked": repacked(fit_E, gpus),
        "replicated": eplb(fit_E, slots, gpus, options.groups, options.nodes),
    }


def _judged(placement: Placement, load_E: np.ndarray) -> float:
    return float(imbalance(gpu_loads(placement, load_E)))


def _chance(layer: _Layer, gpus: int, generator: np.random.Generator) -> float:
    experts, top_k = len(layer.judge_E), min(layer.point.top_k, len(layer.judge_E))
    fair_XE = fair_loads(int(layer.judge_E.sum()) // top_k, experts, top_k, DRAWS, generator)
    return float(imbalance(gpu_loads(contiguous(experts, gpus), fair_XE)).mean())


def _gpu_of(placement: Placement) -> list[int]:
    gpu_E = np.zeros(placement.num_experts, np.int64)
    gpu_E[placement.expert_S] = placement.gpu_S
    return [int(gpu) for gpu in gpu_E]


def _transfer(layers: list[_Layer], domains: tuple[str, ...], options: Options) -> dict[str, dict[str, float]]:
    """Fitted on one half of a domain, or of all, and judged on the other half of each: means over the layers."""
    present = [number for number in range(len(domains)) if all(layer.load_HDE[:, number].any() for layer in layers)]
    fits = {"all": list(range(len(domains)))} | {domains[number]: [number] for number in present}
    found = {}
    for name, members in fits.items():
        even_LD = []
        for layer in layers:
            fit_E = layer.load_HDE[0][members].sum(0)
            placement = _placements(fit_E, options.gpus, options.replicas, options)["replicated"]
            even_LD.append(imbalance(gpu_loads(placement, layer.load_HDE[1][present])))
        means = np.mean(even_LD, 0)
        found[name] = {domains[number]: float(mean) for number, mean in zip(present, means, strict=True)}
    return found


def _over_gpus(layers: list[_Layer], options: Options, generator: np.random.Generator) -> Curve:
    most = min(MOST_GPUS, max(len(layer.fit_E) for layer in layers))
    counts = sorted({options.gpus, *(1 << power for power in range(1, most.bit_length()))})
    lines: dict[str, list[float]] = {policy: [] for policy in (*POLICIES, "chance", "least without replicas")}
    for gpus in counts:
        judged: dict[str, list[float]] = {name: [] for name in lines}
        for layer in layers:
            for policy, placement in _placements(layer.fit_E, gpus, options.replicas, options).items():
                judged[policy].append(_judged(placement, layer.judge_E))
            judged["chance"].append(_chance(layer, gpus, generator))
            judged["least without replicas"].append(float(least_imbalance(layer.judge_E, gpus)))
        for name, values in judged.items():
            lines[name].append(float(np.mean(values)))
    return Curve(
        f"Load of the busiest GPU, by GPUs, with {options.replicas} replicas or what fills them",
        "GPUs",
        "largest load over the mean",
        counts,
        lines,
        chance="chance",
    )


def _over_replicas(layers: list[_Layer], options: Options, means: list[float]) -> Curve:
    experts = max(len(layer.fit_E) for layer in layers)
    steps = sorted({0, options.replicas, *(options.gpus << power for power in range(20))})
    counts = [replicas for replicas in steps if replicas <= max(MOST_COPIES * experts, options.replicas)]
    replicated = [
        float(
            np.mean(
                [
                    _judged(_placements(layer.fit_E, options.gpus, replicas, options)["replicated"], layer.judge_E)
                    for layer in layers
                ]
            )
        )
        for replicas in counts
    ]
    flat = {
        name: [value] * len(counts)
        for name, value in zip(("contiguous", "repacked", "chance"), (*means[:2], means[3]), strict=True)
    }
    return Curve(
        f"Load of the busiest of {options.gpus} GPUs, by replicas",
        "replicas of experts in each layer",
        "largest load over the mean",
        counts,
        {"replicated": replicated, **flat},
        chance="chance",
    )


def _headline(
    means: list[float], options: Options, slots: list[int], transfer: Mapping[str, Mapping[str, float]]
) -> str:
    naive, packed, copied, chance, least = means
    many = f"{slots[0]}" if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
    said = (
        f"On {options.gpus} GPUs the busiest has {naive:.2f} times the mean load, {packed:.2f} repacked, {copied:.2f} "
        f"with copies in {many} slots; by chance {chance:.2f}."
    )
    if least > 1.02:
        said += f" Without copies nothing gets below {least:.2f}: one expert has more than a GPU's share."
    apart = [
        (value, fit, judge)
        for fit, row in transfer.items()
        for judge, value in row.items()
        if fit not in ("all", judge)
    ]
    if apart:
        value, fit, judge = max(apart)
        said += f" Fitted on {shown(fit)} and judged on {shown(judge)} it is {value:.2f}."
    return said


def _assumptions(options: Options) -> tuple[str, ...]:
    fitted = f"the domain {shown(options.domain)}" if options.domain else "every domain"
    judged = "the other domains" if options.domain else "every domain"
    return (
        f"Placements are fitted on one half of the documents of {fitted} and judged on the other half of {judged}.",
        "A layer waits for its busiest GPU, whose time is in proportion to its tokens; copies share theirs evenly.",
        f"Chance is even routers over as many tokens, contiguous, drawn {DRAWS} times with seed {options.seed}.",
        "Copies are chosen and packed as EPLB does it, greedily (deepseek-ai/EPLB).",
        PUBLISHED,
    )
