"""What every what-if asks of its options and of a trace, and what it does with a layer before it counts.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from moectl.errors import InputError, UsageError
from moectl.report.output import Cell
from moectl.routing.whatif.registry import Need
from moectl.traces.statistics import probabilities, require_weights
from moectl.traces.trace import NO_EXPERT, Routed, RoutingTrace

CHUNK = 1 << 13
"""Tokens whose scores are in memory at once, in float64."""

MOST = 10**9
"""What no option is above; there are at most MOST_GPUS GPUs, nodes and replicas, for each of which work is done."""

MOST_GPUS = 1 << 16

_CAPTURE = "Capture the trace from the model: moectl analyze-routing MODEL --trace DIR keeps weights and scores."


def require_numbers(options: Any, *may_be_zero: str) -> None:
    """Check the numbers of a dataclass of options: above 0, or from 0 where `may_be_zero` names them, and `seed`.

    Raises:
        UsageError: one is not, or is larger than anything that could be counted, or no number.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        zero = field.name in (*may_be_zero, "seed")
        most = MOST_GPUS if field.name in ("gpus", "gpus_per_node", "nodes", "replicas") else MOST
        if not (0 <= value <= most if zero else 0 < value <= most):
            least = "from 0" if zero else "above 0 and up"
            raise UsageError(
                f"{field.name} cannot be {value}.",
                "",
                f"Give {field.name}={field.default}, say: a number {least} to {most:,}.",
            )


def require_share(options: Any, name: str) -> None:
    """Check that a number of a dataclass of options is 1 at most.

    Raises:
        UsageError: it is more.
    """
    if getattr(options, name) > 1:
        raise UsageError(f"{name} cannot be {getattr(options, name):g}: that is more than all.", "", "Give 0 to 1.")


def require(trace: RoutingTrace, name: str, *needs: Need) -> None:
    """Check that a trace has tokens and what else a what-if needs of it.

    Raises:
        InputError: it has not.
    """
    if not len(trace) or not trace.layers:
        raise InputError("The trace has no tokens.", f"There is nothing that {name} could count.", _CAPTURE)
    for routed in trace.layers:
        has = {"index": True, "weights": routed.weight_TK is not None, "scores": routed.score_TE is not None}
        missing = [need for need in needs if not has[need]]
        if missing:
            raise InputError(
                f"The trace has no {missing[0]} at {routed.point.name}, and {name} needs them.",
                "What an engine exports are often the experts' numbers alone, and where experts are looked up in a "
                "table there are no scores.",
                _CAPTURE,
            )


def computing_experts(routed: Routed) -> int:
    """How many experts of a point compute something.

    Raises:
        InputError: none does.
    """
    experts = routed.point.num_experts - routed.point.null_experts
    if experts < 1:
        raise InputError(
            f"No expert of {routed.point.name} computes anything.",
            f"The trace says so of {routed.point.null_experts} of {routed.point.num_experts}.",
            _CAPTURE,
        )
    return experts


def computing(routed: Routed) -> tuple[np.ndarray, int]:
    """The experts of each token [T, K] and how many there are; those that compute nothing are none."""
    experts = computing_experts(routed)
    if not routed.point.null_experts:
        return routed.index_TK, experts
    return np.where(routed.index_TK < experts, routed.index_TK, NO_EXPERT), experts


def weights(routed: Routed) -> np.ndarray:
    """What the experts' outputs were multiplied with, float32 [T, K], in size; 0 where there is no expert.

    Raises:
        InputError: one is NaN or infinite.
    """
    assert routed.weight_TK is not None
    weight_TK = np.abs(routed.weight_TK.astype(np.float32))
    weight_TK[computing(routed)[0] < 0] = 0
    require_weights(routed.point, weight_TK)
    return weight_TK


def chunks(routed: Routed) -> Iterator[tuple[slice, np.ndarray]]:
    """Which tokens, and their probabilities of the experts that compute, float64 [CHUNK, E].

    Raises:
        InputError: a score is NaN or infinite.
    """
    assert routed.score_TE is not None
    for start in range(0, len(routed.score_TE), CHUNK):
        at = slice(start, start + CHUNK)
        p_TE = probabilities(routed.point, routed.score_TE[at])
        yield at, np.ascontiguousarray(p_TE[:, : computing_experts(routed)])


def homes(experts: int, groups: int) -> np.ndarray:
    """The group of each expert [E]: neighbours together, as engines place them unasked.

    The first groups have one more where it does not divide (vLLM's `determine_expert_map`); where there are more groups
    than experts, which engines refuse, experts are spread out.
    """
    if groups > experts:
        return np.arange(experts) * groups // experts
    return np.sort(np.arange(experts) % groups)


def with_mean(rows: Sequence[tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    """The rows, and below them the mean of every column of numbers; None where there is no number."""
    means: list[Cell] = []
    for column in list(zip(*rows, strict=True))[1:]:
        numbers = [cell for cell in column if isinstance(cell, int | float)]
        means.append(float(np.mean(numbers)) if numbers else None)
    return (*rows, ("mean", *means))


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
