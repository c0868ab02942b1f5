"""Is an expert that is not on the GPU fetched, or run on the CPU? From which batch on, and what do buffers do?

Legend: T tokens, E experts, L layers, C experts that a buffer holds of a layer, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moectl.errors import InputError
from moectl.routing.placement.loads import halves
from moectl.routing.whatif.asked import computing, computing_experts, require, require_numbers, require_share
from moectl.routing.whatif.chance import choices
from moectl.routing.whatif.eviction import BELADY, LRU, Requests, hits
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.hit_rates import DRAWN, drawn_like
from moectl.routing.whatif.splitting import FETCHED, LONGER, ON_CPU, SUM, batches, buffered, costs, serial
from moectl.traces.trace import RoutingTrace

BATCHES = (1, 4, 16, 64, 256, 1024)
BUFFER, RANDOM = "buffer (LIFO)", "random routing"
POINTS = 12
"""Sizes of buffers that a curve is drawn through."""


@dataclass(frozen=True, slots=True)
class Options:
    """What experts are run on.

    Attributes:
        batch: tokens that go through a layer together, for the buffer and beside 1, 4, 16 to 1024 for the costs.
        resident: share of the experts that are on the GPU, the busiest of all layers; a buffer holds as many of each.
        cpu_us_per_token: microseconds that the CPU takes for a token at an expert.
        expert_mb: megabytes of an expert's weights.
        gb_per_s: at which they are fetched.
        seed: of the random routing.
    """

    batch: int = 32
    resident: float = 0.25
    cpu_us_per_token: float = 250.0
    expert_mb: float = 12.6
    gb_per_s: float = 25.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "resident")
        require_share(self, "resident")


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Add up what both sides take for batches of several sizes, with experts pinned by the other half of the documents.

    Raises:
        InputError: the trace has no tokens to pin by and others to judge by.
    """
    require(trace, "offload")
    fit_T = halves(trace.tokens) == 0
    if fit_T.all():
        raise InputError(
            "The trace has one token.",
            "Experts are pinned by one half of the tokens and judged by the other.",
            "Capture more text: moectl analyze-routing MODEL --data FILE --trace DIR.",
        )
    pinned = _pinned(trace, fit_T, options.resident)
    trace = trace.where(~fit_T)
    copy_us = 1e3 * options.expert_mb / options.gb_per_s
    sizes = sorted({*BATCHES, options.batch})
    rows = [_row(trace, pinned, size, options.cpu_us_per_token, copy_us) for size in sizes]
    changes = next((size for size, row in zip(sizes, rows, strict=True) if 0 < row[4] >= row[3]), None)
    random = _random_change(trace, options.cpu_us_per_token, copy_us)
    least = max(1, round(options.resident * min(map(computing_experts, trace.layers))))
    buffers, held = _buffers(trace, options, least)
    at = held.index(least)
    buffer = {name: rates[at] for name, rates in buffers.items()}
    per_expert, answer = copy_us / options.cpu_us_per_token, rows[sizes.index(options.batch)]
    return Finding(
        "offload",
        _headline(answer, per_expert, (changes, _reached(sizes, random)), buffer, least),
        (
            "batch",
            "experts/layer",
            "random",
            "fetch ms/token",
            "CPU ms/token",
            "Fiddler ms/token",
            "longer side ms/token",
            "on the CPU",
            *(f"in {name}" for name in buffer),
        ),
        tuple((*row, *(buffer.values() if row is answer else [None] * len(buffer))) for row in rows),
        (_costs_curve(rows), _buffer_curve(held, buffers, options.batch)),
        (
            f"The CPU takes {options.cpu_us_per_token:g} us for a token at an expert; to fetch one takes {copy_us:g}.",
            "What runs on the GPU takes no time, nor what goes to and fro; a layer waits for all its experts.",
            "Experts are pinned by how busy they are in one half of the documents; costs are those of the other half.",
            "A batch is tokens of a document that follow one another; the last of a document may be smaller.",
            "Fiddler (arXiv 2402.07033): its code makes the sum of both sides smallest, its comment the longer one.",
            "Fiddler's constants are 70 to fetch and 7 for a token, which is 10 tokens.",
            "Published: Fiddler is 1.26 times as fast as others at one sequence, 1.30 at prefill, 11.57 at beams.",
            "The buffer (arXiv 2303.06182, VI.B) evicts what the batch does not take, then what came in last.",
            "Published: the buffer takes 1.47 times less static memory; 12 GB/s between CPU and GPU were the limit.",
            "Experts run by rising number, and a buffer's hits are counted expert by expert, not batch by batch.",
        ),
        {
            "tokens_per_fetch": per_expert,
            "batch_from_which_fetching_wins": changes,
            "random_batch_from_which_fetching_wins": random,
            "buffer": {"held": held, **buffers},
        },
    )


def _headline(
    row: tuple[float, ...],
    per_expert: float,
    changes: tuple[int | None, int | None],
    buffer: dict[str, float],
    held: int,
) -> str:
    batch, _, _, fetched, cpu, split, _, _ = row
    wins, random = ("at none of the batches" if size is None else f"from batches of {size} on" for size in changes)
    return (
        f"To fetch an expert takes as long as {per_expert:.3g} of its tokens on the CPU. To fetch all that are missing "
        f"beats the CPU {wins} (random routing: {random}). In batches of {batch} a token waits {fetched:.3g} ms so, "
        f"{cpu:.3g} ms for the CPU and {split:.3g} ms where each expert does what is shorter (Fiddler); a buffer of "
        f"{held} finds {buffer[BUFFER]:.1%} of the experts (LRU {buffer[LRU]:.1%}, Belady {buffer[BELADY]:.1%}, random "
        f"routing {buffer[RANDOM]:.1%})."
    )


def _reached(sizes: Sequence[int], least: int | None) -> int | None:
    """The first of the sizes that is large enough, as a trace is asked about these alone."""
    return None if least is None else next((size for size in sizes if size >= least), None)


def _pinned(trace: RoutingTrace, fit_T: np.ndarray, resident: float) -> list[np.ndarray]:
    """Which experts of each layer are on the GPU: the busiest of all layers."""
    counts = []
    for routed in trace.layers:
        key_TK, experts = computing(routed)
        fitted = key_TK[fit_T]
        counts.append(np.bincount(fitted[fitted >= 0], minlength=experts))
    every = np.concatenate(counts)
    on_gpu = np.zeros(len(every), bool)
    on_gpu[np.argsort(-every, kind="stable")[: round(resident * len(every))]] = True
    return np.split(on_gpu, np.cumsum([len(each) for each in counts])[:-1])


def _row(trace: RoutingTrace, pinned: list[np.ndarray], size: int, cpu_us: float, copy_us: float) -> tuple[float, ...]:
    batch_T = batches(trace.tokens.document_T, size)
    total_4, taken, on_cpu, assigned, fair = np.zeros(4), 0, 0, 0, 0.0
    tokens_B = np.bincount(batch_T)
    for routed, own in zip(trace.layers, pinned, strict=True):
        key_TK, experts = computing(routed)
        cost_4, here, left = costs(key_TK, batch_T, own, cpu_us, copy_us)
        total_4 += cost_4
        taken, on_cpu, assigned = taken + here, on_cpu + left, assigned + int((key_TK >= 0).sum())
        fair += float(_fair(experts, choices(key_TK), tokens_B).mean())
    layers = len(trace.layers)
    ms = total_4 / 1e3 / len(trace)
    costs_ms = (float(ms[FETCHED]), float(ms[ON_CPU]), float(ms[SUM]), float(ms[LONGER]))
    return (size, taken / layers / len(tokens_B), fair / layers, *costs_ms, on_cpu / max(assigned, 1))


def _fair(experts: int, share_J: Sequence[float], tokens_B: np.ndarray) -> np.ndarray:
    """How many experts so many tokens take if each draws its own by a fair lot: E (1 - (1 - k/E)^B)."""
    missed = sum(share * (1 - chosen / experts) for chosen, share in enumerate(share_J))
    return np.asarray(experts * (1 - missed**tokens_B))


def _random_change(trace: RoutingTrace, cpu_us: float, copy_us: float) -> int | None:
    """From how many tokens on fetching all experts would beat the CPU under random routing, whatever is pinned."""
    size_P = np.arange(1, BATCHES[-1] + 1)
    fetch_P, cpu_P = np.zeros(len(size_P)), np.zeros(len(size_P))
    for routed in trace.layers:
        key_TK, experts = computing(routed)
        share_J = choices(key_TK)
        fetch_P += _fair(experts, share_J, size_P) * copy_us
        cpu_P += sum(chosen * share for chosen, share in enumerate(share_J)) * size_P * cpu_us
    wins = np.flatnonzero(fetch_P <= cpu_P)
    return int(size_P[wins[0]]) if len(wins) else None


def _buffers(trace: RoutingTrace, options: Options, least: int) -> tuple[dict[str, list[float]], list[int]]:
    """The share of requests that find their expert in buffers of several sizes, and the sizes."""
    most = max(map(computing_experts, trace.layers))
    held = sorted({least, *np.linspace(1, most, POINTS).round().astype(int).tolist()})
    rates = _found(trace, options.batch, held, (BUFFER, LRU, BELADY))
    drawn = drawn_like(trace, trace.layers, DRAWN // len(trace.layers), options.seed)
    rates[RANDOM] = _found(drawn, options.batch, held, (BUFFER,))[BUFFER]
    return rates, held


def _found(trace: RoutingTrace, batch: int, held: list[int], policies: Sequence[str]) -> dict[str, list[float]]:
    batch_T, asked = batches(trace.tokens.document_T, batch), 0
    hits_C = {policy: np.zeros(len(held)) for policy in policies}
    for routed in trace.layers:
        key_TK, experts = computing(routed)
        key_R, batch_R = serial(key_TK, batch_T, experts)
        asked += len(key_R)
        zero_R = np.zeros(len(key_R), np.int64)
        requests = Requests(key_R[:, None], np.zeros(experts, np.int64), zero_R > 0, zero_R, 1)
        for policy in policies:
            if policy == BUFFER:
                hits_C[policy] += [buffered(key_R, batch_R, experts, size) for size in held]
            else:
                hits_C[policy] += hits(requests, policy)[0, np.minimum(held, experts)]
    return {policy: (each / max(asked, 1)).tolist() for policy, each in hits_C.items()}


def _costs_curve(rows: Sequence[tuple[float, ...]]) -> Curve:
    names = ("all fetched", "all on the CPU", "Fiddler (sum)", "Fiddler (longer side)")
    lines = {name: [row[3 + at] for row in rows] for at, name in enumerate(names)}
    bound = "Fiddler (longer side)"
    return Curve(
        "What a token waits for experts", "tokens in a batch", "ms", [row[0] for row in rows], lines, bound=bound
    )


def _buffer_curve(held: list[int], buffers: dict[str, list[float]], batch: int) -> Curve:
    title = f"How often an expert is in the buffer, in batches of {batch}"
    x = [float(size) for size in held]
    return Curve(title, "experts held of each layer", "share", x, buffers, RANDOM, BELADY, percent=True)
