"""What to do with a model on a machine, in words: placement, replicas, cache, capacity and traffic from the what-ifs.

Every sentence has the number that it rests on, the assumption behind it, and the command that shows it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moectl.routing.whatif import steps
from moectl.routing.whatif.asked import computing_experts, require
from moectl.routing.whatif.finding import Finding
from moectl.routing.whatif.machine import Machine, Model
from moectl.routing.whatif.steps import Step
from moectl.traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class Advice:
    """All of it.

    Attributes:
        summary: in a sentence.
        steps: one after another.
        chosen: the same as plain data.
        findings: what the steps rest on, by name.
    """

    summary: str
    steps: tuple[Step, ...]
    chosen: Mapping[str, Any]
    findings: Mapping[str, Finding] = field(default_factory=dict)


def advise(trace: RoutingTrace, machine: Machine, model: Model | None = None) -> Advice:
    """Advice for one machine.

    Raises:
        InputError: the trace has no tokens.
    """
    require(trace, "advice")
    model = Model() if model is None else model
    layers, most = len(trace.layers), max(map(computing_experts, trace.layers))
    expert_gb = None if model.experts_gb is None else model.experts_gb / sum(map(computing_experts, trace.layers))
    free_gb = machine.gpu_memory_gb * (1 - machine.reserved) - (model.other_gb or 0)
    slots = None if not expert_gb else max(0, int(free_gb / (layers * expert_gb) + 1e-9))
    first = steps.balance(trace, most)
    told = [] if first is None else [first]
    told.append(steps.memory(machine, model, layers, most, expert_gb, slots))
    findings: dict[str, Finding] = {}
    fits = slots is None or slots * machine.gpus >= most
    chosen: dict[str, Any] = {
        "fits": fits,
        "slots_per_gpu": slots,
        "replicas": 0,
        "placement": "contiguous",
        "balanced": first is None,
        "cache": None,
    }
    if machine.gpus > 1 and fits:
        spare = most if slots is None else slots * machine.gpus - most
        step, findings["placement"], choice = steps.placed(trace, machine, spare)
        told.append(step)
        chosen |= choice
    if expert_gb and slots and max(routed.point.top_k for routed in trace.layers) <= slots * machine.gpus < most:
        step, findings["cache"], chosen["cache"] = steps.cached(trace, machine, most, slots * machine.gpus, expert_gb)
        told.append(step)
    step, findings["capacity"], chosen["capacity_factor"] = steps.with_capacity(trace, machine)
    told.append(step)
    if machine.gpus > 1:
        uneven = chosen["imbalance"]["after"] if "imbalance" in chosen else steps.unplaced(trace, machine.gpus)
        step, findings["all-to-all"], chosen["tokens_per_s_and_gpu"] = steps.traffic(trace, machine, model, uneven)
        told.append(step)
    if 1 < machine.gpus <= len(trace) and fits and expert_gb and model.hidden_size:
        step, findings["parallelism"], chosen["mix"] = steps.mix(trace, machine, model.hidden_size, expert_gb, free_gb)
        chosen["mix_in_words"] = findings["parallelism"].detail["chosen_in_words"]
        told.append(step)
    return Advice(_summary(chosen, machine), tuple(told), chosen, findings)


def _summary(chosen: Mapping[str, Any], machine: Machine) -> str:
    said = [] if chosen["balanced"] else ["look at the router and the text first, for the loads are far from even"]
    if held := chosen["cache"]:
        said.append(f"keep {held['experts_of_a_layer']} experts of a layer on {machine.gpus} GPUs and fetch the rest")
    elif machine.gpus > 1 and chosen["fits"]:
        said.append(
            {
                "contiguous": f"leave the experts in their order on {machine.gpus} GPUs",
                "repacked": f"repack the experts on {machine.gpus} GPUs by load",
                "replicated": f"spread the experts and {chosen['replicas']} replicas over {machine.gpus} GPUs by load",
            }[chosen["placement"]]
        )
    if not chosen["fits"] and not held:
        said.append("take larger GPUs, or more of them")
    factor = chosen["capacity_factor"]
    said.append(
        "drop nothing" + (f", or take a capacity factor of {factor:.3g}" if factor <= steps.MOST_FACTOR else "")
    )
    if chosen.get("mix") not in (None, f"{machine.gpus} x 1 x 1"):
        said.append(f"weigh against it {chosen['mix_in_words']}, which is modelled to be fastest")
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]
