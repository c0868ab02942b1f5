"""Measure routers: `moectl bench routers`. How many tokens they route in a second, how evenly, and what they drop.

All get the same hidden states, whose mean makes linear gates prefer some experts; those that go by logits get logits of
one linear gate, those with a gate of another form have their own timed with them. In use: no noise, no loss. Beside a
router that `moe_kernels` has a fused kernel for stands the same router with its choice in plain torch.

Legend: T tokens, D hidden, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moectl.bench import device as machine
from moectl.bench.clock import Subject, interleave
from moectl.bench.rows import explain, mean
from moectl.bench.shapes import Shape
from moectl.bench.sweep import OnCell, OnPart, Settings, cells_of, sweep
from moectl.errors import UsageError
from moectl.routers.protocol import NO_EXPERT, Context, Router, Routing, all_served, counts
from moectl.routers.registry import names
from moectl.routers.spelling import Named, parse

Row = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Context]
"""Hidden states, logits, and what else some routers look at."""

SETS = 4
SKEW = 0.5
"""Standard deviation over experts of a gate's mean logit; that of one expert's logits over tokens is 1."""

FUSED: dict[str, tuple[str, str]] = {
    "mixtral": ("softmax", "top2"),
    "olmoe": ("softmax", "top2"),
    "gpt-oss": ("softmax", "top2"),
    "llama4": ("sigmoid", "top2"),
    "deepseek-moe": ("softmax", "top2"),
    "deepseek-v2": ("softmax", "max"),
    "deepseek-v3": ("sigmoid", "top2"),
    "loss-free": ("sigmoid", "top2"),
}
"""Routers that are nothing but what `moe_kernels.route` fuses, with its score and its score of groups."""

PLAIN = "plain torch"
COLUMNS = ("p50_ms", "p20_ms", "p80_ms", "reps", "tokens_per_s", "imbalance", "dropped", "speedup", "speedup_over")


def plain(router: Router, scores_TE: Tensor, score: str, group_score: str) -> tuple[Tensor, Tensor]:
    """What a fused router computes, one operation of torch after the other: index and weight [T, K]."""
    options = router.options
    groups, open_groups = getattr(options, "groups", 1), getattr(options, "top_groups", 1)
    score_TE = scores_TE.float().softmax(-1) if score == "softmax" else scores_TE.float().sigmoid()
    choice_TE = score_TE + getattr(router, "bias", 0.0) if score == "sigmoid" else score_TE
    if open_groups < groups and hasattr(options, "top_groups"):
        group_TGM = choice_TE.unflatten(-1, (groups, -1))
        best_TG = group_TGM.amax(-1)
        if group_score == "top2" and group_TGM.shape[-1] > 1:
            best_TG = group_TGM.topk(2).values.sum(-1)
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, best_TG.topk(open_groups).indices, False)
        choice_TE = group_TGM.masked_fill(closed_TG[..., None], -math.inf).flatten(1)
    index_TK = choice_TE.topk(options.top_k).indices
    weight_TK = score_TE.gather(1, index_TK)
    if getattr(options, "normalize", False):
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return index_TK, weight_TK * getattr(options, "scale", 1.0)


def measure(settings: Settings, on_cell: OnCell = lambda _title: None, on_part: OnPart | None = None) -> dict[str, Any]:
    """One row per shape, dtype, number of tokens and router (`settings.backends`, all where there is none).

    `on_part` as in `sweep`.

    Raises:
        MachineError: no such device.
        UsageError: as `asked`.
    """
    device = machine.pick(settings.device)
    routers = asked(",".join(settings.backends or names()))

    def prepare(shape: Shape, dtype: str) -> Callable[[int], list[Row]]:
        def measured(tokens: int) -> list[Row]:
            start = {"model": shape.name, "dtype": dtype, "tokens": tokens}
            return [{**start, **row} for row in _cell(routers, shape, dtype, tokens, settings, device)]

        return measured

    said = {"seed": settings.seed, "clock": settings.clock, "skew": SKEW}
    found = cells_of(settings, on_cell, prepare)
    with torch.no_grad():
        return sweep(settings, device, "routers", said, found, lambda rows, _: {"rows": rows}, on_part, roofs=False)


def asked(text: str) -> list[Named]:
    """The routers in a list, each of which can be measured.

    Raises:
        UsageError: no such router or option, or one that does not choose experts for tokens.
    """
    found = parse(text)
    for named in found:
        if named.entry.kind != "router":
            raise UsageError(
                f"{named.entry.name} cannot be measured.",
                "It is a layer of its own, not a router that chooses experts for tokens.",
                f"Leave it out; moectl routers {named.entry.name} says what it is.",
            )
        named.options()  # a wrong one is said before anything is measured
    return found


def _cell(
    asked: list[Named], shape: Shape, dtype: str, tokens: int, settings: Settings, device: torch.device
) -> Iterator[Row]:
    """The rows of one number of tokens: all routers in turn on the same inputs."""
    generator = torch.Generator().manual_seed(settings.seed)
    mean_D = SKEW * torch.randn(shape.hidden_size, generator=generator)
    gate_ED = torch.randn(shape.num_experts, shape.hidden_size, generator=generator) * shape.hidden_size**-0.5
    inputs = []
    for _ in range(SETS):
        hidden_TD = mean_D + torch.randn(tokens, shape.hidden_size, generator=generator)
        hidden_TD = hidden_TD.to(device, machine.DTYPES[dtype])
        scores_TE = torch.nn.functional.linear(hidden_TD, gate_ED.to(hidden_TD)).float()
        inputs.append((hidden_TD, scores_TE, _context(tokens, generator, device)))

    found: dict[str, Row] = {}
    subjects: dict[str, Subject] = {}
    for named in asked:
        name = named.text
        try:
            torch.manual_seed(settings.seed + 1)  # not the numbers of which the inputs are made
            router = _made(named, shape).to(device)
            call = _call(router, by_hidden="hidden" in named.entry.needs)
            found[name] = _looked_at([call(given) for given in inputs], router)
        except Exception as error:
            found[name] = {"reason": explain(error)}
            continue
        subjects[name] = Subject.in_turn(inputs, call)
        if named.entry.name in FUSED:
            peer = _peer(router, *FUSED[named.entry.name])
            found[f"{name}, {PLAIN}"] = _looked_at([peer(given) for given in inputs], router)
            subjects[f"{name}, {PLAIN}"] = Subject.in_turn(inputs, peer)

    def failed(name: str, error: Exception) -> None:
        found[name] = {"reason": explain(error)}

    clock = machine.clock_of(device, settings.clock)
    for name, sample in interleave(subjects, clock, settings.seconds, failed).items():
        found[name] |= sample.columns()
        found[name]["tokens_per_s"] = 1000 * tokens / found[name]["p50_ms"]
    for name, row in found.items():
        over = found.get(f"{name}, {PLAIN}", {}).get("p50_ms")
        faster = {"speedup": over / row["p50_ms"], "speedup_over": PLAIN} if over and row.get("p50_ms") else {}
        yield {"backend": name, **dict.fromkeys(COLUMNS), **row, **faster, "reason": row.get("reason")}


def _made(named: Named, shape: Shape) -> Router:
    """With the shape's top-k where a router's own is not 1: a Switch stays one."""
    kind = named.entry.load()
    own = kind.Options().top_k
    defaults: dict[str, Any] = {"top_k": shape.top_k} if own > 1 else {}
    options = named.options(**defaults, init=shape.hidden_size**-0.5)  # noisy top-k's gate starts at 0: all equal
    router: Router = kind(shape.hidden_size, shape.num_experts, options)
    return router.eval()


def _context(tokens: int, generator: torch.Generator, device: torch.device) -> Context:
    """What some routers look at: token ids, sequences of 64 tokens, each of a task, and modalities."""
    sequence_T = torch.arange(tokens) // 64
    return Context(
        token_T=torch.randint(500, (tokens,), generator=generator).to(device),
        sequence_T=sequence_T.to(device),
        task_T=(sequence_T % 2).to(device),
        modality_T=torch.randint(2, (tokens,), generator=generator).to(device),
        generator=torch.Generator(device),
    )


def _call(router: Router, by_hidden: bool) -> Callable[[Inputs], Routing]:
    if by_hidden:
        return lambda given: router(given[0], given[2])
    return lambda given: router.route(given[1], given[2])


def _peer(router: Router, score: str, group_score: str) -> Callable[[Inputs], Routing]:
    return lambda given: all_served(*plain(router, given[1], score, group_score))


def _looked_at(routings: list[Routing], router: Router) -> Row:
    """Balance and drops of what was routed."""
    dropped = sum(int(routing.dropped_TK.sum()) for routing in routings)
    placed = sum(int((routing.index_TK != NO_EXPERT).sum()) for routing in routings)
    index = [routing.index_TK for routing in routings]
    beyond = max(int(index_TK.max()) for index_TK in index) >= router.num_experts
    return {
        "imbalance": _imbalance(index, getattr(router, "reach", 0) if beyond else router.num_experts),
        "dropped": dropped / max(dropped + placed, 1),
    }


def _imbalance(index: list[Tensor], experts: int) -> float:
    """Largest over mean load, averaged over inputs; 1 where nobody goes anywhere."""
    loads = [counts(index_TK, experts).double() for index_TK in index]
    return mean([float(load_E.max() / load_E.mean()) if load_E.any() else 1.0 for load_E in loads])
