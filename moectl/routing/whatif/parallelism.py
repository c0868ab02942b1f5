"""Which mix of expert parallelism, slices and copies suits the loads that were measured?

The trace is read as batches of tokens in their order, which stand on the GPUs in that order too.
Legend: B batches, C copies, E experts, P pieces of tokens that are counted once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moectl.report.output import Cell
from moectl.routing.placement.hardware import Hardware
from moectl.routing.placement.loads import batch_loads, require_tokens
from moectl.routing.placement.mixes import Mix, busiest, held_bytes, mixes, seconds
from moectl.routing.placement.placement import fair_loads
from moectl.routing.whatif.asked import computing, computing_experts, require_numbers
from moectl.routing.whatif.finding import Curve, Finding
from moectl.traces.trace import Routed, RoutingTrace

MOST_PIECES = 1 << 15
DRAWS = 1 << 12
MOST_LINES = 8


@dataclass(frozen=True, slots=True)
class Options(Hardware):
    """The machine and the model.

    Attributes:
        batch_tokens: tokens of a batch, over all GPUs; at most what the trace has.
        memory_gb_per_s: what a GPU reads of its memory in a second.
        memory_gb: what the experts of all layers may take of a GPU's memory.
        sharded: copies hold a part of the weights each and gather the rest (Tutel); else each holds all.
        seed: of what chance draws.
    """

    batch_tokens: int = 4096
    memory_gb_per_s: float = 2000.0
    memory_gb: float = 60.0
    sharded: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self)


@dataclass(frozen=True, slots=True)
class _Timed:
    """Of one mix: seconds of computing, exchanging and weights, and the largest load over the mean."""

    parts: np.ndarray
    uneven: float

    @property
    def total(self) -> float:
        return float(self.parts.sum())


def run(trace: RoutingTrace, options: Options) -> Finding:
    """The modelled time of each mix, and the fastest that fits.

    Raises:
        InputError: the trace has fewer tokens than there are GPUs.
    """
    require_tokens(trace, f"parallelism with gpus={options.gpus}", options.gpus)
    piece, per_gpu = _pieces(len(trace), options)
    experts_L = [computing_experts(routed) for routed in trace.layers]
    choices = list(mixes(options.gpus, min(experts_L), options.intermediate_size))
    scales = [1 << power for power in range(32) if (options.gpus * piece) << power <= len(trace)]
    timed = _timed((batch_loads(routed, piece) for routed in trace.layers), choices, scales, piece, options)
    scale = per_gpu // piece
    generator = np.random.default_rng(options.seed)
    fair = (_fair(routed, piece, scale, options.gpus, generator) for routed in trace.layers)
    chance = _timed(fair, choices, [scale], piece, options)
    held = {
        mix: sum(held_bytes(mix, experts, options, sharded=options.sharded) for experts in experts_L) / 1e9
        for mix in choices
    }
    top_k = max(routed.point.top_k for routed in trace.layers)
    return _finding(timed[scale], chance[scale], timed, held, experts_L, top_k, per_gpu, piece, options)


def _pieces(tokens: int, options: Options) -> tuple[int, int]:
    """How many tokens are counted at once, and how many of a batch a GPU has: a power of two times that."""
    per_gpu = max(1, min(options.batch_tokens, tokens) // options.gpus)
    piece = per_gpu
    while piece % 2 == 0 and tokens // (piece // 2) <= MOST_PIECES:
        piece //= 2
    return piece, per_gpu


def _timed(
    layers: Iterable[np.ndarray], choices: list[Mix], scales: list[int], piece: int, options: Options
) -> dict[int, dict[Mix, _Timed]]:
    """Means over layers and batches, of batches that have each of `scales` pieces on every GPU."""
    found: dict[int, dict[Mix, list[_Timed]]] = {scale: {mix: [] for mix in choices} for scale in scales}
    for load_PE in layers:
        for scale, timed in found.items():
            by_copies: dict[int, np.ndarray] = {}
            for mix in choices:
                if mix.copies not in by_copies:
                    by_copies[mix.copies] = _cut(load_PE, mix, scale)
                load_BCE = by_copies[mix.copies]
                largest_B = busiest(mix, load_BCE)
                mean_B = load_BCE.sum((1, 2)) / (mix.ranks * mix.copies)
                tokens, rate = scale * piece * mix.gpus, options.memory_gb_per_s
                parts = seconds(mix, largest_B, tokens, load_PE.shape[1], options, rate, sharded=options.sharded)
                timed[mix].append(_Timed(parts.mean(1), float(largest_B.sum() / mean_B.sum() if mean_B.any() else 1.0)))
    return {scale: {mix: _mean(each) for mix, each in timed.items()} for scale, timed in found.items()}


def _cut(load_PE: np.ndarray, mix: Mix, scale: int) -> np.ndarray:
    """The loads of the tokens of each copy, by batches that have `scale` pieces on every GPU [B, C, E]."""
    batches = len(load_PE) // (mix.gpus * scale)
    whole = load_PE[: batches * mix.gpus * scale]
    return np.asarray(whole.reshape(batches, mix.copies, -1, load_PE.shape[1]).sum(2))


def _mean(timed: list[_Timed]) -> _Timed:
    return _Timed(np.mean([each.parts for each in timed], 0), float(np.mean([each.uneven for each in timed])))


def _fair(routed: Routed, piece: int, scale: int, gpus: int, generator: np.random.Generator) -> np.ndarray:
    """Pieces of an even router that chooses as often as the trace has it [P, E]."""
    index_TK, experts = computing(routed)
    top_k = min(routed.point.top_k, experts)
    per_token = float((index_TK >= 0).sum(1).mean())
    return fair_loads(piece, experts, top_k, max(DRAWS, gpus * scale), generator) * (per_token / top_k)


def _finding(
    now: dict[Mix, _Timed],
    chance: dict[Mix, _Timed],
    timed: dict[int, dict[Mix, _Timed]],
    held: dict[Mix, float],
    experts_L: list[int],
    top_k: int,
    per_gpu: int,
    piece: int,
    options: Options,
) -> Finding:
    ordered = sorted(now, key=lambda mix: now[mix].total)
    # Where layers have other numbers of experts, Tutel may call the same mix differently.
    names = {mix: {mix.tutel(experts) for experts in experts_L} for mix in ordered}
    tutel = {mix: next(iter(each)) if len(each) == 1 else None for mix, each in names.items()}
    rows: list[tuple[Cell, ...]] = [
        (
            mix.name,
            tutel[mix],
            now[mix].uneven,
            *(float(part) * 1e3 for part in now[mix].parts),
            now[mix].total * 1e3,
            chance[mix].total * 1e3,
            held[mix],
            "yes" if held[mix] <= options.memory_gb else "no",
        )
        for mix in ordered
    ]
    fitting = [mix for mix in ordered if held[mix] <= options.memory_gb]
    chosen = fitting[0] if fitting else None
    least, of = min(held.values()), "" if chosen == ordered[0] else f" of those that fit in {options.memory_gb:g} GB"
    headline = (
        f"For {per_gpu * options.gpus} tokens on {options.gpus} GPUs, {chosen.name} (ranks x slices x copies) is "
        f"fastest{of}: {now[chosen].total * 1e3:.3g} ms a layer, {chance[chosen].total * 1e3:.3g} ms by chance, with "
        f"{held[chosen]:.3g} GB of experts on a GPU."
        if chosen
        else f"No mix fits in {options.memory_gb:g} GB: the experts take {least:.3g} GB of each of {options.gpus} GPUs."
    )
    best = {str(scale * piece * options.gpus): _best(found, fitting) for scale, found in timed.items()}
    auto = _tutel_auto(max(experts_L), top_k, per_gpu, options)
    return Finding(
        "parallelism",
        headline,
        (
            "ranks x slices x copies",
            "Tutel's r",
            "largest load over the mean",
            "computing ms",
            "exchange ms",
            "weights ms",
            "total ms",
            "total ms by chance",
            "GB of experts on a GPU",
            "fits",
        ),
        tuple(rows),
        (_curve(timed, ordered, fitting, piece, options),),
        _assumptions(options),
        {
            "chosen": chosen.name if chosen else None,
            "chosen_in_words": chosen.words if chosen else None,
            "chosen_tutel_r": tutel[chosen] if chosen else None,
            "tutel_auto": auto,
            "best_by_batch_tokens": best,
            "total_ms": {mix.name: now[mix].total * 1e3 for mix in ordered},
        },
    )


def _best(found: dict[Mix, _Timed], fitting: list[Mix]) -> str | None:
    return min(fitting, key=lambda mix: found[mix].total).name if fitting else None


def _tutel_auto(experts: int, top_k: int, per_gpu: int, options: Options) -> str | None:
    """What Tutel's parallel_type 'auto' takes: `model` where sending tokens to all slices is less than gathering them.

    It compares numbers of values, 2 (slices - 1) times those of a GPU's tokens and those of its weights.
    """
    if experts >= options.gpus:
        return None
    tokens = top_k * per_gpu * options.hidden_size
    weights = 3 * options.hidden_size * options.intermediate_size * experts / options.gpus
    return "model" if 2 * tokens * (options.gpus // experts - 1) < weights else "data"


def _curve(
    timed: dict[int, dict[Mix, _Timed]], ordered: list[Mix], fitting: list[Mix], piece: int, options: Options
) -> Curve:
    offered = fitting or ordered
    winners = [min(offered, key=lambda mix: found[mix].total) for found in timed.values()]
    drawn = list(dict.fromkeys([*winners, *offered]))[:MOST_LINES]
    return Curve(
        f"Time of a layer on {options.gpus} GPUs, by batch",
        "tokens of a batch",
        "ms a layer",
        [scale * piece * options.gpus for scale in timed],
        {mix.name: [found[mix].total * 1e3 for found in timed.values()] for mix in drawn},
    )


def _assumptions(options: Options) -> tuple[str, ...]:
    said, held = options.said(), "hold a part each and gather the rest" if options.sharded else "hold all"
    return (
        (
            f"{said[0].upper()}{said[1:]}; {options.tflops:g} TFLOP/s, {options.gb_per_s:g} GB/s between GPUs and "
            f"{options.memory_gb_per_s:g} GB/s of memory; nothing overlaps, and all GPUs are equally far apart."
        ),
        f"Experts stand by their numbers; a batch waits for its busiest rank; copies {held}.",
        (
            "Narrow slices compute as fast as whole experts. A token is sent once for each of its experts, to each "
            "slice; without ranks, tokens are gathered instead."
        ),
        "GB are of weights alone: gradients, optimiser and what else the model has are not in them.",
        "Tutel reports 4.96x and 5.75x for a layer on 16 and 2,048 A100 (2206.03382), with other gains in it.",
    )
