"""How many bytes expert parallelism sends between GPUs and between nodes, and to how many of them a token goes.

A token that goes to several experts of a node need cross to it once (as DeepSeek-V3 does, arXiv 2412.19437, 3.2.2),
or once for each. A hierarchical exchange (HetuMoE, arXiv 2203.14685; Hetu, `python/hetu/gpu_ops/HAllToAll.py`) sends
the same bytes between nodes in fewer and larger messages: the GPUs of a node send all to its first, which exchanges
with the first of every other node and hands out what came.
Legend: T tokens, K choices, E experts, G GPUs, N nodes, D domains, S sums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moectl.compiled import compiled
from moectl.errors import InputError, UsageError
from moectl.report.output import Cell
from moectl.routing.whatif.asked import computing, homes, mean, require, require_numbers, with_mean
from moectl.routing.whatif.chance import Shares, choices, groups_met, inside
from moectl.routing.whatif.finding import Curve, Finding
from moectl.text import escape, shown
from moectl.traces.trace import RoutingTrace, Tokens

SUMS = ("gpus", "nodes", "other gpus", "other nodes", "copies to other gpus", "copies to other nodes", "tokens")


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        gpus: that the experts are spread over.
        gpus_per_node: neighbouring numbers are on one node.
        hidden_size: values of a token.
        bytes_per_value: 2 for bfloat16, 1 for float8.
        home: where a token is before it is sent: `document` (all of a document on one GPU, documents in turn) or
            `round-robin` (tokens in turn).
        placement: a JSON file with the GPU of every expert of every layer, as `--what-if placement --json` writes it;
            empty: neighbours together.
        batch_tokens: tokens of one exchange, of all GPUs together, for the sizes of messages.
    """

    gpus: int = 16
    gpus_per_node: int = 8
    hidden_size: int = 4096
    bytes_per_value: int = 2
    home: str = "document"
    placement: str = ""
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.gpus % self.gpus_per_node:
            raise UsageError(
                f"{self.gpus} GPUs are no whole number of nodes of {self.gpus_per_node}.", "", "Give a multiple of it."
            )
        if self.home not in ("document", "round-robin"):
            raise UsageError(f"There is no home {shown(self.home)!r}.", "", "Give document or round-robin.")


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Nodes and GPUs per token, and the bytes of a dispatch.

    Raises:
        InputError: the placement is not of these layers, experts and GPUs.
    """
    require(trace, "all-to-all")
    placed = _placement(trace, options)
    home_T = _home(trace.tokens, options)
    home_G = np.bincount(home_T, minlength=options.gpus) / len(home_T)
    node_G = np.arange(options.gpus) // options.gpus_per_node
    kb = options.hidden_size * options.bytes_per_value / 1000
    rows: list[tuple[Cell, ...]] = []
    sums_LDS, curve = [], []
    devices = [1 << power for power in range(int(max(r.point.num_experts for r in trace.layers)).bit_length())]
    for routed, gpu_E in zip(trace.layers, placed, strict=True):
        index_TK, experts = computing(routed)
        share_J = choices(index_TK)
        sums_DS = traffic(index_TK, gpu_E, node_G, home_T, trace.tokens.domain_T, len(trace.tokens.domains))
        sums_LDS.append(sums_DS)
        per_S = (sums_DS.sum(0) / len(trace)).tolist()
        nodes, gpus = (np.bincount(part_E, minlength=1) for part_E in (node_G[gpu_E], gpu_E))
        other = _others(experts, nodes, share_J, np.bincount(node_G, home_G))
        rows.append(
            (
                *(routed.point.label, per_S[1], groups_met(experts, nodes, share_J)),
                *(per_S[0], groups_met(experts, gpus, share_J)),
                *(per_S[3] * kb, other * kb, per_S[5] * kb, per_S[2] * kb, per_S[4] * kb),
            )
        )
        curve.append([_met(index_TK, experts, each, share_J) for each in devices])
    columns = (
        *("layer", "nodes", "nodes by chance", "GPUs", "GPUs by chance"),
        *("kB to other nodes", "by chance", "with a copy per expert", "kB to other GPUs", "GPUs, a copy per expert"),
    )
    per_LS = np.array(sums_LDS).sum(1) / len(trace)
    messages = _messages(per_LS.mean(0), options)
    domains = _domains(trace, np.array(sums_LDS))
    total = with_mean(rows)[-1]
    nodes_all = options.gpus // options.gpus_per_node
    on_gpus = f"{total[3]:.2f} of {options.gpus} GPUs (random routing: {total[4]:.2f})"
    headline = (
        (
            f"A token's experts are on {total[1]:.2f} of {nodes_all} nodes (random routing: {total[2]:.2f}) and on "
            f"{on_gpus}. Sent once per node, a token takes {total[5]:.1f} kB between nodes per layer and direction "
            f"(random routing: {total[6]:.1f}), and {total[7]:.1f} kB with a copy per expert."
        )
        if nodes_all > 1
        else (
            f"A token's experts are on {on_gpus}. Sent once per GPU, a token takes {total[8]:.1f} kB between GPUs per "
            f"layer and direction, and {total[9]:.1f} kB with a copy per expert."
        )
    )
    return Finding(
        "all-to-all",
        headline,
        columns,
        with_mean(rows),
        (_curve(devices, np.array(curve)),),
        _assumptions(options, messages),
        {"domains": domains, "messages": messages, "sums": dict(zip(SUMS, per_LS.mean(0).tolist(), strict=True))},
    )


def traffic(
    index_TK: np.ndarray,
    gpu_E: np.ndarray,
    node_G: np.ndarray,
    home_T: np.ndarray,
    domain_T: np.ndarray,
    domains: int,
) -> np.ndarray:
    """SUMS over the tokens of every domain [D, S]."""
    sums_DS = np.zeros((domains, len(SUMS)), np.int64)
    parts = (part.astype(np.int64) for part in (gpu_E, node_G, home_T, domain_T))
    _traffic(index_TK, *parts, sums_DS)
    return sums_DS


@compiled
def _traffic(
    index_TK: np.ndarray,
    gpu_E: np.ndarray,
    node_G: np.ndarray,
    home_T: np.ndarray,
    domain_T: np.ndarray,
    sums_DS: np.ndarray,
) -> None:
    last_G, last_N = np.full(len(node_G), -1), np.full(len(node_G), -1)
    for token in range(len(index_TK)):
        sums_S, home = sums_DS[domain_T[token]], home_T[token]
        sums_S[6] += 1
        for k in range(index_TK.shape[1]):
            if index_TK[token, k] < 0:
                continue
            gpu = gpu_E[index_TK[token, k]]
            node = node_G[gpu]
            sums_S[4] += gpu != home
            sums_S[5] += node != node_G[home]
            if last_G[gpu] != token:
                last_G[gpu] = token
                sums_S[0] += 1
                sums_S[2] += gpu != home
            if last_N[node] != token:
                last_N[node] = token
                sums_S[1] += 1
                sums_S[3] += node != node_G[home]


def _placement(trace: RoutingTrace, options: Options) -> list[np.ndarray]:
    sizes = [computing(routed)[1] for routed in trace.layers]
    if not options.placement:
        return [homes(experts, options.gpus) for experts in sizes]
    try:
        given = _sought(json.loads(Path(options.placement).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{escape(options.placement)} cannot be read: {escape(str(error))}.",
            "It is to have the GPU of every expert of every layer.",
            "Give what `--what-if placement --json` writes.",
        ) from None
    try:
        placed = [np.array(row, np.int64) for row in given or ()]
    except (TypeError, ValueError, OverflowError):
        placed = []
    fits = [len(row) for row in placed] == sizes and all(row.ndim == 1 for row in placed)
    if not fits or not all(0 <= row.min() <= row.max() < options.gpus for row in placed):
        raise InputError(
            f"{escape(options.placement)} places no {len(sizes)} layers of {sizes[0]} experts on {options.gpus} GPUs.",
            "Its `expert_gpu` must be a list of layers, each a list with the GPU of every expert.",
            "Give what `--what-if placement --json` writes for the same trace and GPUs.",
        )
    return placed


def _sought(document: Any) -> Any:
    """The first `expert_gpu` in a document, wherever it is."""
    if isinstance(document, dict) and "expert_gpu" in document:
        return document["expert_gpu"]
    parts = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return next((found for part in parts if (found := _sought(part)) is not None), None)


def _home(tokens: Tokens, options: Options) -> np.ndarray:
    order_T = tokens.document_T if options.home == "document" else np.arange(len(tokens))
    return np.asarray(order_T % options.gpus, np.int64)


def _others(experts: int, sizes_N: np.ndarray, share_J: Shares, home_N: np.ndarray) -> float:
    """How many nodes other than its own a token meets by chance."""
    own = sum(
        share * (1 - inside(experts, int(size), share_J)[0]) for size, share in zip(sizes_N, home_N, strict=False)
    )
    return groups_met(experts, sizes_N.tolist(), share_J) - float(own)


def _met(index_TK: np.ndarray, experts: int, devices: int, share_J: Shares) -> tuple[float, float] | tuple[None, None]:
    """Devices per token, and by chance, if neighbouring experts are together on that many."""
    if devices > experts:
        return None, None
    device_E = homes(experts, devices)
    nowhere_T, alone_G = np.zeros(len(index_TK), np.int64), np.zeros(devices, np.int64)
    sums_DS = traffic(index_TK, device_E, alone_G, nowhere_T, nowhere_T, 1)
    return float(sums_DS[0, 0] / len(index_TK)), groups_met(experts, np.bincount(device_E).tolist(), share_J)


def _curve(devices: list[int], curve_LG2: np.ndarray) -> Curve:
    measured, chance = ([mean(list(curve_LG2[:, at, line])) for at in range(len(devices))] for line in (0, 1))
    lines = {"this trace": measured, "random routing": chance}
    x_label = "GPUs or nodes that the experts are spread over, neighbours together"
    return Curve("Places that a token is sent to", x_label, "per token", devices, lines, chance="random routing")


def _messages(per_S: np.ndarray, options: Options) -> dict[str, float]:
    """Of one exchange between nodes: how many, and how large on average, in bytes."""
    nodes, each = options.gpus // options.gpus_per_node, options.gpus_per_node
    size = options.hidden_size * options.bytes_per_value * options.batch_tokens
    pairs = nodes * (nodes - 1)
    flat, copies = pairs * each * each, per_S[5] * size
    return {
        "flat messages": flat,
        "flat bytes": float(copies / flat) if flat else 0.0,
        "hierarchical messages": pairs,
        "hierarchical bytes": float(copies / pairs) if pairs else 0.0,
        "hierarchical bytes, once per node": float(per_S[3] * size / pairs) if pairs else 0.0,
    }


def _domains(trace: RoutingTrace, sums_LDS: np.ndarray) -> Mapping[str, Any]:
    found = {}
    for number, name in enumerate(trace.tokens.domains):
        sums_S = sums_LDS[:, number].sum(0)
        if sums_S[-1]:
            found[name] = {"nodes": float(sums_S[1] / sums_S[-1]), "gpus": float(sums_S[0] / sums_S[-1])}
    return found


def _assumptions(options: Options, messages: Mapping[str, float]) -> tuple[str, ...]:
    where = f"as in {escape(options.placement)}" if options.placement else "with neighbouring experts together"
    whose = "documents are dealt to the GPUs in turn" if options.home == "document" else "tokens are dealt in turn"
    exchange = (
        f"An exchange of {options.batch_tokens} tokens sends {messages['flat messages']:.0f} messages of "
        f"{messages['flat bytes'] / 1e3:.1f} kB between nodes, or {messages['hierarchical messages']:.0f} of "
        f"{messages['hierarchical bytes'] / 1e3:.1f} kB where the first GPU of a node sends for all (HetuMoE), a "
        "copy per expert in both."
    )
    return (
        f"{options.gpus} GPUs, {options.gpus_per_node} on a node, {where}; {whose}.",
        (
            f"{options.hidden_size} values of {options.bytes_per_value} bytes a token; the way back takes as much "
            "again in the same type. Numbers and weights of experts, and padding, are not counted."
        ),
        (
            "Chance: every token draws its experts by a fair lot, sum over nodes of 1 - C(E - e, k) / C(E, k); 5.29 of "
            "8 nodes for 8 of 256 experts. DeepSeek-V3 allows 4 nodes (arXiv 2412.19437)."
        ),
        *[exchange] * bool(messages["flat messages"]),
    )
